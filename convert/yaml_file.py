"""Reading YAML that we do not trust: bounded, without tags, anchors and aliases, its scalars read as JSON's are.

PyYAML parses; what a text means is decided here, so that no scalar can cost more than its length, and 1e-5 is a number.
Imports no torch.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from lmx.core.errors import InputError
from lmx.core.files import quoted, read_bounded
from lmx.core.jsonfile import JSON

LIMIT_BYTES = 128 << 10  # OLMo's configs have some 30 kB, most of it names of data
_MAX_DEPTH = 64
_INTEGER = re.compile(r"[-+]?[0-9]{1,18}")
_NUMBER = re.compile(r"[-+]?([0-9]{1,18}\.?[0-9]{0,18}|\.[0-9]{1,18})([eE][-+]?[0-9]{1,3})?")
_WORDS: dict[str, JSON] = {"null": None, "~": None, "": None, "true": True, "false": False}
_DAMAGED = "the file is damaged or was edited by hand: repair it, or download it again"


def read_yaml(path: Path) -> dict[str, JSON]:
    """Read a file that holds one mapping.

    Raises NotFoundError where there is none, and InputError where it is too large, no valid YAML, or uses more than
    plain mappings, lists and scalars.
    """
    data, where = read_bounded(path, LIMIT_BYTES), quoted(str(path))
    try:
        value = _build(data.decode())
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{where} is not valid YAML: {reason}", _DAMAGED) from error
    if not isinstance(value, dict):
        raise InputError(f"{where} holds no mapping", _DAMAGED)
    return value


@dataclass
class _Open:
    """A mapping or a list that is being read; `key`: the one whose value comes next."""

    value: dict[str, JSON] | list[JSON]
    key: str | None = None

    def put(self, item: JSON, is_text: bool) -> None:
        """Take the next item. Raises ValueError for a key that is no text, or stands twice."""
        if isinstance(self.value, list):
            self.value.append(item)
        elif self.key is not None:
            self.value[self.key], self.key = item, None
        elif not is_text or str(item) in self.value:
            raise ValueError("a key is no text" if not is_text else "a key stands twice in one mapping")
        else:
            self.key = str(item)


def _build(text: str) -> JSON:
    """The one document of a text, from the parser's events, without recursion."""
    root = _Open([])
    stack = [root]
    for event in yaml.parse(text, Loader=yaml.BaseLoader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise ValueError("anchors and aliases are not read")
        if isinstance(event, yaml.ScalarEvent):
            is_key = isinstance(stack[-1].value, dict) and stack[-1].key is None
            plain = event.style is None and not is_key
            stack[-1].put(_scalar(event.value) if plain else event.value, is_text=True)
        elif isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            stack.append(_Open({} if isinstance(event, yaml.MappingStartEvent) else []))
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            stack[-2].put(stack.pop().value, is_text=False)
        if len(stack) > _MAX_DEPTH:
            raise ValueError("it is nested too deeply")
    documents = root.value
    if len(documents) > 1 or not isinstance(documents, list):
        raise ValueError("it holds several documents")
    return documents[0] if documents else None


def _scalar(text: str) -> JSON:
    """What a text without quotes means."""
    if text in _WORDS or text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _NUMBER.fullmatch(text) else text
