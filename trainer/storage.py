"""How a recipe says that storages are reached, told to the data pipeline."""

from pathlib import Path

from data_pipeline import storage
from data_pipeline.credentials import reveal
from trainer.data_sections import StorageSection
from trainer.recipe import Recipe


def reach_storage(recipe: Recipe) -> None:
    """From now on this process reaches shards as `recipe` says.

    Raises UserError for an environment variable that it names and that is not set here.
    """
    data = recipe.data
    _use(data.storage, data.cache_dir, data.cache_bytes)


def reach_plain_storage() -> None:
    """As a recipe that says nothing of storage would."""
    _use(StorageSection(), None, 0)


def _use(section: StorageSection, cache_dir: str | None, cache_bytes: int) -> None:
    options, hidden = reveal(section.options)
    storage.use(
        storage.Access(
            options=options,
            hidden=hidden,
            timeout=section.timeout_seconds,
            attempts=section.attempts,
            requests=section.requests,
            cache_dir=Path(cache_dir).expanduser() if cache_dir else None,
            cache_bytes=cache_bytes,
        )
    )
