"""docs/data.md names every key of data and sources, and what it shows can be read."""

from __future__ import annotations

import re

from mtopd.config import TeacherConfig
from mtopd.config_data import DataConfig, ExampleConfig, SourceConfig
from mtopd.data.answers import NORMALIZATIONS
from mtopd.data.prompt_file import COLUMNS
from mtopd.data.readers import FORMATS
from mtopd.yaml_file import parse_yaml
from tests.conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "data.md").read_text()


def test_every_key_format_and_rule_is_named() -> None:
    names = [*COLUMNS, *FORMATS, *NORMALIZATIONS, "last_number", "boxed", "tag", "regex"]
    for model in (DataConfig, SourceConfig, ExampleConfig):
        names += model.model_fields
    missing = [n for n in names if not re.search(rf"(?<![\w.]){re.escape(n)}(?!\w)", PAGE)]
    assert missing == []


def test_the_examples_are_configs() -> None:
    data, routes = (
        parse_yaml(text, "docs/data.md") for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    )
    sources = DataConfig.model_validate(data["data"]).sources
    assert sources[0].fields == {"level": "3", "effort": "high"}
    used = {key for source in sources for key in source.model_fields_set}
    assert used == set(SourceConfig.model_fields), "the example shows every key of a source"
    teachers = [TeacherConfig.model_validate(teacher) for teacher in routes["teachers"]]
    assert teachers[0].route == {"domain": "math", "level": "3"}
