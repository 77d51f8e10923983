"""Ship the weights as 8-bit numbers with one scale per row, and unpack them again.

`python -m cribsheet_pocket.quantize FOLDER [FOLDER ...]` packs a trained folder, or the mean of several runs that go
on from each other (arXiv 2203.05482), into the package's data.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

DATA = Path(__file__).parent / "data"
PACKED = "weights-int8.safetensors"
DIGEST = "digest.txt"
_PLAIN = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_WEIGHTS = "model.safetensors"


def pack_matrix(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Eight-bit rows and their scales: (R, C) -> (R, C) int8 and (R,) float32."""
    import torch

    scale = weight.float().abs().amax(1).clamp(min=1e-12) / 127
    return (weight.float() / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def unpack_matrix(rows: Tensor, scale: Tensor) -> Tensor:
    """The matrix that `pack_matrix` packed, in bf16."""
    import torch

    return (rows.float() * scale[:, None]).to(torch.bfloat16)


def load_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder, whatever its shards."""
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("model*.safetensors")):
        tensors |= load_file(shard)
    return tensors


def mean_of(folders: Sequence[Path]) -> dict[str, Tensor]:
    """The tensors of model folders of one shape, averaged in float32."""
    import torch

    tensors = [load_folder(folder) for folder in folders]
    return {name: torch.stack([each[name].float() for each in tensors]).mean(0) for name in tensors[0]}


def pack(*folders: Path, data: Path = DATA) -> int:
    """Write the mean of the folders' weights into `data` with 8-bit rows; the size in bytes."""
    import torch
    from safetensors.torch import save_file

    data.mkdir(parents=True, exist_ok=True)
    packed: dict[str, Tensor] = {}
    for name, tensor in mean_of(folders).items():
        if tensor.dim() == 2:
            packed[name], packed[name + ".scale"] = pack_matrix(tensor)
        else:
            packed[name] = tensor.to(torch.bfloat16)
    save_file(packed, data / PACKED)
    (data / PACKED).chmod(0o644)
    config = json.loads((folders[0] / "config.json").read_text(encoding="utf-8"))
    (data / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")} | {"do_sample": False}
    (data / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n", encoding="utf-8")
    (data / DIGEST).write_text(digest(data) + "\n", encoding="utf-8")
    return (data / PACKED).stat().st_size


def digest(data: Path = DATA) -> str:
    """SHA-256 of everything that the unpacked folder is made from."""
    total = hashlib.sha256()
    for name in (*_PLAIN, PACKED):
        total.update(f"{name}\0".encode())
        total.update((data / name).read_bytes())
    return total.hexdigest()


def unpack(folder: Path) -> Path:
    """Write the plain model folder, bf16 weights included, to the new or empty `folder`."""
    from safetensors.torch import load_file, save_file

    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; export the pocket model to a new folder.")
    packed = load_file(DATA / PACKED)
    tensors = {
        name: unpack_matrix(tensor, packed[name + ".scale"]) if name + ".scale" in packed else tensor
        for name, tensor in packed.items()
        if not name.endswith(".scale")
    }
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    (folder / _WEIGHTS).chmod(0o644)
    for name in _PLAIN:
        shutil.copyfile(DATA / name, folder / name)
    return folder


def cache_folder() -> Path:
    """Where the user's caches of cribsheet live: CRIBSHEET_CACHE, or the platform's place for caches."""
    if chosen := os.environ.get("CRIBSHEET_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "cribsheet"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "cribsheet"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cribsheet"


def unpacked() -> Path:
    """The unpacked folder in the cache, made on first use.

    A folder appears under its name only when it is whole: it is written beside it and renamed.  Of two processes that
    do so at once, the second finds the name taken and drops its copy.
    """
    place = cache_folder() / f"pocket-{(DATA / DIGEST).read_text(encoding='utf-8').strip()[:16]}"
    if _whole(place):
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=place.name + "-", suffix=".part", dir=place.parent))
    except OSError as problem:
        raise OSError(f"The pocket model cannot be unpacked to {place.parent} ({problem.strerror}); "
                      "set CRIBSHEET_CACHE to a folder that can be written.") from problem  # fmt: skip
    try:
        unpack(fresh)
        fresh.chmod(0o755)
        if place.exists() and not _whole(place):  # somebody has removed files from it
            place.rename(fresh.with_suffix(".broken"))
            shutil.rmtree(fresh.with_suffix(".broken"), ignore_errors=True)
        fresh.rename(place)
    except OSError:
        if not _whole(place):
            raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return place


def _whole(place: Path) -> bool:
    return all((place / name).is_file() for name in (*_PLAIN, _WEIGHTS))


def main() -> None:
    """Pack a trained folder."""
    parser = argparse.ArgumentParser(prog="python -m cribsheet_pocket.quantize", description=main.__doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="with bf16 weights and config.json; several are averaged")
    size = pack(*parser.parse_args().folders)
    sys.stdout.write(f"{DATA / PACKED}: {size / 2**20:.1f} MiB\n")


if __name__ == "__main__":
    main()
