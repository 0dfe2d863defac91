"""What the server says of itself on every route that is not TGI's own."""

from __future__ import annotations

from dataclasses import dataclass

from text_generation_router.errors import UnknownModel
from text_generation_router.metrics import Metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    metrics: Metrics
    model_id: str
    created: int
    """When the server started, in seconds since 1970."""
    payload_limit: int
    compute_type: bytes

    def check_model(self, asked: str | None) -> None:
        """Raises: UnknownModel. ``tgi`` is how TGI's clients call whatever there is."""
        if not self.serves(asked):
            raise UnknownModel(str(asked), self.model_id)

    def serves(self, name: str | None) -> bool:
        # What huggingface_hub's client calls a server that it was given the address of.
        return name in (None, "", "tgi", "dummy", self.model_id, self.model_id.rstrip("/").rpartition("/")[2])
