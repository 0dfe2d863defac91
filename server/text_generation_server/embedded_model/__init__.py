"""The small model that ships with this package; `build` makes it."""

from pathlib import Path


def embedded_model_path() -> Path:
    """The model's folder, laid out like a download from the Hugging Face hub."""
    return Path(__file__).parent / "files"
