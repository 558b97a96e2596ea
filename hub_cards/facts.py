"""What the files of a directory say, and the proof that a text has no figure from anywhere else.

A `Fact` is a value that remembers its file and key. As text it stands between two marks, which survive templates and
joins; `settle` takes the marks away, and refuses a text with digits outside them.
"""

import json
import re
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

START, END = "\ue000", "\ue001"
"""Around what a file backs: private characters, which no document has."""
NO_FIGURES = re.compile(r"^```.*?^```$|https?://\S+|arXiv:[\d.]+", re.S | re.M)
"""Where digits are no figures: code, which is tested, and addresses."""
WRITERS = {
    "*config.json": "`MimiModel.save_pretrained` writes it",
    "summary.json": "`accelerate launch -m training RECIPE` writes it",
    "evaluation/*": "`mimi evaluate DIR DATA -o DIR/{folder}` writes it",
    "benchmark.json": "`python tests/benchmarks/small_checkpoint.py DIR -o DIR/benchmark.json` writes it",
    "tokens.json": "`mimi tokenize DATA --to DIR` writes it",
    "card.yaml": "it is written by hand, as `hub_cards/card.py` says",
}
"""Where each file comes from."""


class CardError(ValueError):
    """A card cannot be rendered; the message names the file, the key and what writes it."""


class Facts:
    """The files of a directory. `used` are the names of those that the card has taken something from.

    Args:
        directory: where the files are.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.used: set[str] = set()

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return (self.directory / name).is_file()

    def read(self, name: str) -> "Fact":
        """The whole of a JSON, YAML or text file.

        Raises:
            CardError: there is no such file, or it cannot be read.
        """
        path = self.directory / name
        try:
            text = path.read_text(encoding="utf-8")
            parse = {".json": json.loads, ".yaml": yaml.safe_load}.get(path.suffix, str)
            return Fact(parse(text), name, "", self.used)
        except FileNotFoundError as error:
            raise CardError(f"{path} is missing: {_writer(name)}.") from error
        except (json.JSONDecodeError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise CardError(f"{path} cannot be read ({' '.join(str(error).split())}): {_writer(name)}.") from error

    def optional(self, name: str) -> "Fact | None":
        """The same, or None if there is no such file."""
        return self.read(name) if self.has(name) else None

    def sources(self) -> list[str]:
        """The files that were used so far, as marked text; not what people declared."""
        return [f"{START}{name}{END}" for name in sorted(self.used - {"card.yaml"})]


class Fact:
    """A value with its source. What is inside is reached by attribute or index, and is a fact, too.

    Its text is marked. `value` gives what it holds, and what is computed from that is a fact again by `derive`.
    """

    __slots__ = ("_file", "_key", "_used", "_value")

    def __init__(self, value: Any, file: str, key: str, used: set[str]):
        self._value, self._file, self._key, self._used = value, file, key, used

    def __getattr__(self, name: str) -> "Fact":
        if name.startswith("__"):  # what Python and Jinja look for by themselves
            raise AttributeError(name)
        return self[name]

    def __getitem__(self, key: str | int) -> "Fact":
        path = f"{self._key}.{key}" if self._key else str(key)
        if isinstance(self._value, dict) and key not in self._value:
            raise CardError(f'{self._file} has no "{path}", which the card needs: {_writer(self._file)}.')
        try:
            return Fact(self._value[key], self._file, path, self._used)
        except (KeyError, IndexError, TypeError) as error:
            raise CardError(f'"{path}" is not in {self._file} as the card needs it: {_writer(self._file)}.') from error

    def __iter__(self) -> Iterator["Fact"]:
        """The entries of a list, the keys of a mapping."""
        keys = range(len(self._value)) if isinstance(self._value, list) else list(self._value)
        for key in keys:
            yield self[key] if isinstance(self._value, list) else derive(key, self)

    def __contains__(self, key: object) -> bool:
        return key in self._value

    def __len__(self) -> int:
        return len(self._value)

    def __bool__(self) -> bool:
        return bool(self._value)

    def __str__(self) -> str:
        return marked(self)


def marked(fact: Fact, form: Callable[[Any], str] = str) -> str:
    """A fact as text that `settle` knows.

    Args:
        fact: A single value.
        form: From the value to text.

    Raises:
        CardError: there is no value, a list or mapping of them, or one that has no such form.
    """
    fact._used.add(fact._file)
    problem = "is null" if fact._value is None else "is not a single value"
    try:
        if fact._value is not None and not isinstance(fact._value, (dict, list)):
            return f"{START}{form(fact._value)}{END}"
    except (TypeError, ValueError):
        problem = f"is {fact._value!r}, not a number"
    raise CardError(f'"{fact._key}" of {fact._file} {problem}, and the card shows it: {_writer(fact._file)}.')


def value(fact: Fact) -> Any:
    """The value alone, without its source: to compute with, and for metadata."""
    return fact._value


def get(fact: Fact | None, key: str) -> Fact | None:
    """What is there under a key, or None."""
    return fact[key] if fact and key in fact else None


def get_value(fact: Fact | None, key: str) -> Any:
    """The same without its source."""
    return value(fact[key]) if fact and key in fact else None


def origin(fact: Fact) -> str:
    """The name of the file that it is from."""
    return fact._file


def derive(result: Any, source: Fact) -> Fact:
    """A fact that was computed from another."""
    return Fact(result, source._file, source._key, source._used)


def figures(text: str) -> list[str]:
    """The numbers of a text, each once: `8`, but not the 8 of `int8`."""
    return list(dict.fromkeys(figure.strip(".,") for figure in re.findall(r"(?<!\w)\d[\d.,]*", text)))


def settle(text: str) -> str:
    """The text without its marks.

    Raises:
        CardError: it has figures that no file backs.
    """
    unmarked = re.sub(f"{START}[^{END}]*{END}", START, text)
    if found := figures(NO_FIGURES.sub("", unmarked)):
        raise CardError(f"The card has figures that no file backs: {', '.join(found)}. Let a run write them into one.")
    return text.replace(START, "").replace(END, "")


def _writer(name: str) -> str:
    """What writes a file."""
    found = next((text for pattern, text in WRITERS.items() if fnmatch(name, pattern)), "it belongs to the model")
    return found.format(folder=Path(name).parent.as_posix())
