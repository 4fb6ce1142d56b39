import math

import pytest

from ezmia_callbacks.errors import ConfigurationError
from ezmia_callbacks.results.moment import Moment


@pytest.mark.parametrize("epoch", [math.nan, math.inf])
def test_an_epoch_that_is_no_number_is_refused(epoch):
    with pytest.raises(ConfigurationError, match="`epoch` must be a finite number or None"):
        Moment(3, epoch)


def test_an_unknown_epoch_is_none():
    assert Moment(3, None).epoch is None
