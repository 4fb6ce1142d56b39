import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ezmia_callbacks.scoring.checksums import checksums

TYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
]


def checksum(tensor):
    return checksums({"": tensor})[""]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3,), (8, 5), (1024,), (3, 7, 11), (65, 1030)], ids=str)
def test_equal_bits_have_equal_numbers_wherever_they_lie(dtype, shape):
    tensor = (4 * draw(*shape)).to(dtype)
    padded = torch.cat([torch.ones(1).to(dtype), tensor.reshape(-1)])

    assert checksum(tensor) == checksum(tensor.clone())
    # A view that starts in the middle of a word.
    assert checksum(padded[1:].view(shape)) == checksum(tensor)


@pytest.mark.parametrize("shape", [(8, 5), (3, 7, 11), (2, 2048)], ids=str)
def test_a_view_that_is_not_contiguous_counts_as_its_values(shape):
    tensor = draw(*shape)
    assert checksum(tensor.transpose(0, 1)) == checksum(tensor.transpose(0, 1).contiguous())


@settings(max_examples=200, deadline=None)
@given(n=st.integers(1, 5000), place=st.integers(0, 4999), bit=st.integers(0, 15))
def test_a_single_bit_is_seen(n, place, bit):
    words = torch.arange(n, dtype=torch.int16)
    changed = words.clone()
    changed[place % n] ^= torch.tensor(1 << bit if bit < 15 else -(1 << 15), dtype=torch.int16)

    assert checksum(words.view(torch.bfloat16)) != checksum(changed.view(torch.bfloat16))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_two_values_that_change_places_are_seen(data):
    n = data.draw(st.integers(2, 6000))
    a, b = data.draw(st.lists(st.integers(0, n - 1), min_size=2, max_size=2, unique=True))
    values = torch.arange(n, dtype=torch.float32)
    changed = values.clone()
    changed[a], changed[b] = values[b], values[a]

    assert checksum(values) != checksum(changed)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t * 2.0,
        lambda t: t / 2.0,
        lambda t: -t,
        lambda t: t.flip(0),
        lambda t: t.flip(1),
        lambda t: t.roll(1, 0),
        lambda t: t.roll(1024, 1),
        lambda t: t[torch.randperm(len(t), generator=torch.Generator().manual_seed(1))],
        lambda t: torch.zeros_like(t),
        lambda t: t.reshape(-1, 32),
        lambda t: t.double(),
        lambda t: t.view(torch.int32),
        lambda t: t + 1e-5 * (torch.arange(t.numel()).view_as(t) == 77),
    ],
)
def test_what_happens_to_weights_is_seen(change):
    tensor = 1.0 + draw(64, 2048).abs()
    assert checksum(tensor) != checksum(change(tensor))


def test_the_sign_of_zero_and_the_bits_of_nan_count():
    assert checksum(torch.tensor([0.0])) != checksum(torch.tensor([-0.0]))
    nan = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert checksum(nan[:1]) == checksum(nan[:1].clone())
    assert checksum(nan[:1]) != checksum(nan[1:])


def test_numbers_collide_no_more_often_than_chance_has_it():
    tensors = {str(seed): draw(40, 50, seed=seed) for seed in range(2000)}
    assert len(set(checksums(tensors).values())) == len(tensors)


def test_tensors_without_values_have_none():
    assert checksums({"a": torch.empty(3, device="meta"), "b": torch.ones(3)})["a"] == 0


def test_inference_tensors_and_parameters_are_taken():
    with torch.inference_mode():
        tensor = torch.ones(5)
    assert checksum(tensor) == checksum(torch.nn.Parameter(torch.ones(5)))


def test_a_number_stays_what_it_is_from_release_to_release():
    assert checksum(torch.arange(3000, dtype=torch.float32)) == 9000969893029742099
