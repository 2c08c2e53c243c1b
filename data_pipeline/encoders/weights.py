"""Networks of others, from folders of this machine: nothing is fetched and nothing unpickled."""

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from data_pipeline.storing import reason
from flows.errors import UserError

# Configuration, weights, and the several shapes of tokenizers.
PARTS = ("*.json", "*.safetensors", "*.txt", "*.model")
CHUNK = 4 << 20
# What loading raises for files that are missing, damaged, or of another network.
DAMAGE = (
    OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, SafetensorError,
)  # fmt: skip


def read_config(folder: Path, what: str) -> dict[str, Any]:
    """The `config.json` of a network; raises UserError if the folder holds none.

    what: what the folder should be, for messages
    """
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except OSError as error:
        raise UserError(
            f"{folder}: is no folder with a config.json ({error.strerror}); give the local folder of "
            f"{what}"
        ) from error
    except ValueError as error:
        raise UserError(
            f"{folder}/config.json: is not JSON ({reason(error)}); copy it again"
        ) from error
    if not isinstance(config, dict):
        raise UserError(f"{folder}/config.json: is not a configuration; copy it again")
    if not list(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder}: has no .safetensors weights, and other formats can run code; convert them"
        )
    return config


def fingerprint(folder: Path) -> str:
    """Hash of all that decides a network's output: configuration, weights and tokenizer files."""
    digest = hashlib.sha256()
    for path in sorted({path for part in PARTS for path in folder.glob(part)}):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def check_complete(folder: Path, missing: Any) -> None:
    """Raises UserError if the weights left a part of the network at random values."""
    names = sorted(missing)
    if names:
        raise UserError(
            f"{folder}: its weights lack {names[0]} and {len(names) - 1} more of what config.json "
            "names; copy the whole network"
        )
