"""docs/config.md says what the models are."""

from __future__ import annotations

from pydantic import BaseModel

from mtopd.config import ConsolidateConfig
from mtopd.config_docs import _tables, markdown
from mtopd.config_file import validate
from mtopd.config_specialist import SpecialistConfig
from mtopd.yaml_file import parse_yaml
from tests.conftest import REPOSITORY
from tests.readme_commands import MAX_COMMANDS, commands


def test_the_page_is_the_models() -> None:
    found = (REPOSITORY / "docs" / "config.md").read_text()
    assert found == markdown(), "run: python -m mtopd.config_docs > docs/config.md"


def test_the_readmes_own_teachers_are_a_config() -> None:
    """`make readme` runs it."""
    found = commands((REPOSITORY / "README.md").read_text())
    assert len(found) <= MAX_COMMANDS
    (text,) = (command for command in found if "<<'YAML'" in command)
    values = parse_yaml("\n".join(text.splitlines()[1:-1]), "README.md")
    config = validate(values, ConsolidateConfig, "README.md")
    assert config.data.sources[0].has_held_out
    assert config.evaluation.baselines.keys() == {"base", *(t.name for t in config.teachers)}


def test_every_key_has_a_meaning_and_a_row() -> None:
    page = markdown()
    for root in (ConsolidateConfig, SpecialistConfig):
        models: list[type[BaseModel]] = [model for _, model in _tables(root)]
        assert len(models) > 5
        for model in models:
            for name, field in model.model_fields.items():
                assert field.description, f"{model.__name__}.{name} lacks its docstring"
                assert f"| `{name}` |" in page
    for row in (
        "| `lr` | number above 0 | needed |",
        "| `micro_batch_size` | whole number at least 1 and at most 16777216 | - |",
        "| `store` | path or URL | needed |",
        "| `route` | table of text, a number, true or false | needed |",
        "| `mtp` | `freeze`, `drop` | `freeze` |",
        "| `tolerance` | number at least 0 and below 1 | `0.1` |",
    ):
        assert row in page
