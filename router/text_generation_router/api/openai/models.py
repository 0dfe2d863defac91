"""``/v1/models`` and ``/v1/models/{id}``."""

from __future__ import annotations

import msgspec
from starlette.types import Receive, Scope, Send

from text_generation_router.api.openai.schemas import Model, ModelList
from text_generation_router.api.reply import JSON, send_body
from text_generation_router.api.served import Served
from text_generation_router.errors import UnknownModel

_encode = msgspec.json.Encoder().encode


class ModelRoutes:
    def __init__(self, served: Served) -> None:
        self._served = served
        model = served.model_id
        # OpenAI's clients and TGI's read both: when it was made, and by whom, is known of no model here.
        self._model = Model(id=model, object="model", created=served.created, owned_by=model)

    async def list(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_body(send, _encode(ModelList("list", [self._model])), JSON)

    async def one(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = scope["path_params"]["model"]
        if not name or not self._served.serves(name):
            raise UnknownModel(name, self._served.model_id)
        await send_body(send, _encode(self._model), JSON)
