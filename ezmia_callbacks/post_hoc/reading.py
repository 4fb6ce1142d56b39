"""The canaries as token rows: with which tokenizer they are read, and whether the checkpoints' own agree.

Whoever wrote a checkpoint wrote its tokenizer, too, and one that tears the records into other tokens makes
any model look private. So the base's tokenizer reads them, and a checkpoint that reads them otherwise is an
error until the user has said which of the two is right.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ezmia_callbacks.canaries.records import record_kind
from ezmia_callbacks.canaries.sets import CanarySet
from ezmia_callbacks.errors import AuditError, ConfigurationError
from ezmia_callbacks.post_hoc.checkpoints import Checkpoint
from ezmia_callbacks.post_hoc.models import Loader
from ezmia_callbacks.results.result import Finding
from ezmia_callbacks.safe_text import describe_error, get_logger
from ezmia_callbacks.scoring.rows import EncodedCanaries, Tokenizer, TokenRow, encode_canaries

__all__: list[str] = []

logger = get_logger(__name__)

_BASE, _CHECKPOINT = "base", "checkpoint"
_OF_BASE = "the base"
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "tekken*", "*.model", "*.tiktoken")
# What a tokenizer may be read from; equal files need no second look.
_READ_FOR_TOKENS = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".vocab", ".bpe", ".spm")
_NOT_READ = frozenset({"trainer_state.json", "adapter_config.json", "generation_config.json"})
_ADVICE = (
    "Choose with --tokenizer: base, checkpoint (its files then decide what is measured), or the folder of "
    "the one that training used; or give the canaries as token ids, as training fed them."
)


@dataclass(frozen=True)
class Reading:
    """The canaries as they are scored.

    Attributes:
        canaries: As token rows, without those that are equal then.
        tokenizer: What made them; None where no text had to be read.
        source: Where it came from, in words; None without one.
        findings: Where another tokenizer at hand would have made other rows.
    """

    canaries: CanarySet
    tokenizer: Tokenizer | None = None
    source: str | None = None
    findings: tuple[Finding, ...] = ()


def read_canaries(
    canaries: CanarySet,
    checkpoints: Sequence[Checkpoint],
    loader: Loader,
    *,
    tokenizer: str | Path | None,
    max_length: int | None,
    score: str,
) -> Reading:
    """The canaries as token rows.

    Args:
        canaries: The canaries.
        checkpoints: The checkpoints that are audited, all on the loader's base.
        loader: Loads the tokenizers.
        tokenizer: `"base"`, `"checkpoint"`, or the folder or hub id of one; None for the base's, if the
            checkpoints' own agree with it.
        max_length: Truncation of raw text, in tokens.
        score: The score that decides; zlib needs the text of tokens.

    Raises:
        ConfigurationError: if a tokenizer is needed and cannot be loaded, or cannot read the canaries, or the
            checkpoints' own read them otherwise and nobody said which is right.
        CanaryError: if the canaries cannot be encoded.
    """
    is_text = any(record_kind(record) != "tokenized" for record in canaries.records)
    if not is_text and score != "zlib":
        return Reading(_distinct(canaries, encode_canaries(canaries, max_length=max_length)))
    chosen, source = _load(tokenizer, checkpoints, loader)
    encoded = _encode(canaries, chosen, max_length=max_length, source=source)
    reading = Reading(_distinct(canaries, encoded), chosen, source)
    if not is_text:
        return reading
    differences = {
        name: difference
        for name, other in _others(tokenizer, checkpoints, loader)
        if (difference := _difference(canaries, encoded, other, max_length=max_length))
    }
    if not differences:
        return reading
    text = f"The canaries were read with {source}: that of "
    text += "; that of ".join(f"{name} {difference}" for name, difference in differences.items())
    # Two checkpoints that disagree cannot both be right.
    is_open = tokenizer is None or (str(tokenizer) == _CHECKPOINT and differences.keys() - {_OF_BASE})
    if is_open:
        raise ConfigurationError(f"{text}. {_ADVICE}")
    return replace(reading, findings=(Finding("tokenizers differ", True, f"{text}."),))


def _load(
    tokenizer: str | Path | None, checkpoints: Sequence[Checkpoint], loader: Loader
) -> tuple[Tokenizer, str]:
    if tokenizer is None or str(tokenizer) == _BASE:
        try:
            return _load_that_of_base(loader), "the tokenizer of the base"
        except ConfigurationError as error:
            raise ConfigurationError(f"{error} {_ADVICE}") from error
    if str(tokenizer) == _CHECKPOINT:
        for checkpoint in reversed(checkpoints):
            if _has_tokenizer(checkpoint.path):
                return loader.load_tokenizer(checkpoint.path), f"the tokenizer of {checkpoint.name}"
        raise ConfigurationError(f"No checkpoint has a tokenizer of its own. {_ADVICE}")
    is_here = Path(tokenizer).is_dir()
    if is_here:
        _check_has_tokenizer(Path(tokenizer))
    return loader.load_tokenizer(tokenizer, is_here=is_here), f"the tokenizer {str(tokenizer)!r}"


def _others(
    tokenizer: str | Path | None, checkpoints: Sequence[Checkpoint], loader: Loader
) -> Iterator[tuple[str, Tokenizer | str]]:
    """The tokenizers not chosen, each once, after what it is called; a text says why one cannot be had."""
    if tokenizer is not None and str(tokenizer) != _BASE:
        # A base without a tokenizer is why another was named.
        with suppress(ConfigurationError):
            yield _OF_BASE, _load_that_of_base(loader)
    if tokenizer is not None and str(tokenizer) not in (_BASE, _CHECKPOINT):
        return
    seen = set()
    for checkpoint in checkpoints:
        for path in (checkpoint.path, *checkpoint.twins):
            if not _has_tokenizer(path) or (digest := _digest(path)) in seen:
                continue
            seen.add(digest)
            name = checkpoint.name if path == checkpoint.path else path.resolve().name
            try:
                yield name, loader.load_tokenizer(path)
            except ConfigurationError as error:
                yield name, f"cannot be compared with it ({error})"


def _difference(
    canaries: CanarySet, encoded: EncodedCanaries, other: Tokenizer | str, *, max_length: int | None
) -> str:
    """How another tokenizer reads the canaries, after its name; empty if it reads them the same."""
    if isinstance(other, str):
        return other
    try:
        read = encode_canaries(canaries, other, max_length=max_length)
    except Exception as error:  # templates and tokenizers of others fail in ways of their own
        return f"cannot read them ({describe_error(error)})"
    one, another = (dict(zip(rows.record_ids, rows.rows, strict=True)) for rows in (encoded, read))
    n_other = sum(
        name not in one or name not in another or not _are_equal(one[name], another[name])
        for name in one.keys() | another.keys()
    )
    return f"makes other tokens of {n_other} of {len(canaries)}" if n_other else ""


def _are_equal(one: TokenRow, other: TokenRow) -> bool:
    return np.array_equal(one.input_ids, other.input_ids) and np.array_equal(one.labels, other.labels)


def _encode(
    canaries: CanarySet, tokenizer: Tokenizer, *, max_length: int | None, source: str
) -> EncodedCanaries:
    try:
        return encode_canaries(canaries, tokenizer, max_length=max_length)
    except AuditError:
        raise
    except Exception as error:  # no template for chats, or one that fails
        raise ConfigurationError(
            f"The canaries cannot be read with {source} ({describe_error(error)}). {_ADVICE}"
        ) from error


def _load_that_of_base(loader: Loader) -> Tokenizer:
    if loader.base.is_on_this_machine:
        _check_has_tokenizer(Path(loader.base.source))
    return loader.load_tokenizer_of_base()


def _check_has_tokenizer(folder: Path) -> None:
    # transformers makes an empty one from the model's configuration.
    if not _has_tokenizer(folder):
        raise ConfigurationError(f"{str(folder)!r} cannot be loaded as a tokenizer: it holds no file of one.")


def _has_tokenizer(folder: Path) -> bool:
    return any(path.is_file() for pattern in _TOKENIZER_FILES for path in folder.glob(pattern))


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in _READ_FOR_TOKENS and path.name not in _NOT_READ and path.is_file():
            content = path.read_bytes()
            digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _distinct(canaries: CanarySet, encoded: EncodedCanaries) -> CanarySet:
    """The canaries as token rows, without those that truncation has made equal.

    The choice does not look at membership, so that a random split stays one. The callback does the same.
    """
    keys = [row.input_ids.tobytes() for row in encoded.rows]
    n_copies = Counter(keys)
    kept = [i for i, key in enumerate(keys) if n_copies[key] == 1]
    if len(kept) < len(canaries):
        logger.warning(
            "%d of %d canaries are left out: fewer than two of their tokens carry loss, or truncation makes "
            "them the same as another.",
            len(canaries) - len(kept),
            len(canaries),
        )
    return canaries.select(
        canaries.indices_of(encoded.record_ids[i] for i in kept),
        records=[encoded.rows[i].as_record() for i in kept],
    )
