"""Reading YAML that we do not trust: bounded, without tags, anchors and aliases, its scalars read as JSON's are.

The loader is PyYAML's that makes texts of everything; what a text means is decided here, so that no scalar can cost
more than its length, and 1e-5 is a number. Imports no torch.
"""

import re
from pathlib import Path

import yaml

from lmx.core.errors import InputError
from lmx.core.files import quoted, read_bounded
from lmx.core.jsonfile import JSON

LIMIT_BYTES = 128 << 10  # OLMo's configs have some 30 kB, most of it names of data
_INTEGER = re.compile(r"[-+]?[0-9]{1,18}")
_NUMBER = re.compile(r"[-+]?([0-9]{1,18}\.?[0-9]{0,18}|\.[0-9]{1,18})([eE][-+]?[0-9]{1,3})?")
_WORDS: dict[str, JSON] = {"null": None, "~": None, "": None, "true": True, "false": False}
_DAMAGED = "the file is damaged or was edited by hand: repair it, or download it again"


class _PlainLoader(yaml.BaseLoader):
    """Texts, lists and mappings; no anchors, so that nothing can be larger than the file."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise yaml.MarkedYAMLError(problem="anchors and aliases are not read", problem_mark=event.start_mark)
        return super().compose_node(parent, index)


def read_yaml(path: Path) -> dict[str, JSON]:
    """Read a file that holds one mapping.

    Raises NotFoundError where there is none, and InputError where it is too large, no valid YAML, or uses more than
    plain mappings, lists and scalars.
    """
    data, where = read_bounded(path, LIMIT_BYTES), quoted(str(path))
    try:
        node = yaml.compose(data.decode(), Loader=_PlainLoader)
        value = None if node is None else _value(node)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{where} is not valid YAML: {reason}", _DAMAGED) from error
    except RecursionError as error:
        raise InputError(f"{where} is nested too deeply", _DAMAGED) from error
    if not isinstance(value, dict):
        raise InputError(f"{where} holds no mapping", _DAMAGED)
    return value


def _value(node: yaml.Node) -> JSON:
    if isinstance(node, yaml.MappingNode):
        pairs = [(_key(key), _value(item)) for key, item in node.value]
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key stands twice in one mapping")
        return dict(pairs)
    if isinstance(node, yaml.SequenceNode):
        return [_value(item) for item in node.value]
    if not isinstance(node, yaml.ScalarNode) or not isinstance(node.value, str):
        raise ValueError("a node of an unknown kind")
    return _scalar(node.value) if node.style is None else node.value


def _key(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError("a key is no text")
    return str(node.value)


def _scalar(text: str) -> JSON:
    """What a text without quotes means."""
    if text in _WORDS or text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _NUMBER.fullmatch(text) else text
