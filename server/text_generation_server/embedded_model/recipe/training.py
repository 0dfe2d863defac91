"""Trains the model: Llama architecture, bf16 weights with float32 masters, loss on the answers alone.

Shapes: B rows of a batch, T tokens of the longest row, N answer tokens of a batch.
"""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from text_generation_server.embedded_model.recipe.corpus import EXAMPLES_PER_STEP, held_out, stream
from text_generation_server.embedded_model.recipe.example import Example
from text_generation_server.embedded_model.recipe.tokenizer import VOCAB_SIZE

MAX_POSITIONS = 2048
END_IDS = (2, 0)
"""`<|im_end|>` ends a chat turn, `<|endoftext|>` a plain completion."""

TURN_ID = 1
"""`<|im_start|>`."""

TOKENS_PER_PASS = 8192
AVERAGE_DECAY = 0.97
WARM_UP = 0.02
DECAY_FROM = 0.4
"""Parts of the run: the learning rate rises, stays, and falls in a line to zero from here on."""


@dataclass(frozen=True, slots=True)
class Row:
    """An example as token ids; the answer begins at `start`."""

    ids: list[int]
    start: int


@dataclass(frozen=True, slots=True)
class Budget:
    """How long to train: a number of steps, or else minutes of wall time."""

    steps: int | None
    minutes: float

    def progress(self, step: int, started: float) -> float:
        """The part of the run that is over, 0 to 1."""
        if self.steps is not None:
            return min(1.0, step / self.steps)
        return min(1.0, (time.monotonic() - started) / (60 * self.minutes))


def new_model(seed: int) -> LlamaForCausalLM:
    """An untrained model in bf16."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        attn_implementation="eager",  # on CPU, the backward pass of the fused one takes longer than all the rest
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=list(END_IDS),
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=list(END_IDS), pad_token_id=0)
    for parameter in model.parameters():  # not `model.to`, which would round the rotary frequencies too
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


def load_model(folder: Path) -> LlamaForCausalLM:
    """A model that was trained before, to be trained on."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")


def encode(tokenizer: Tokenizer, examples: list[Example], rng: random.Random) -> list[Row]:
    """Token ids of examples. A plain prompt mostly begins with BOS and a chat mostly does not; both bear the other."""
    prompts = tokenizer.encode_batch_fast([e.prompt for e in examples], add_special_tokens=False)
    answers = tokenizer.encode_batch_fast([e.answer for e in examples], add_special_tokens=False)
    rows = []
    for example, prompt, answer in zip(examples, prompts, answers, strict=True):
        begins = rng.random() < (0.1 if example.prompt.startswith("<|im_start|>") else 0.85)
        ids = [0, *prompt.ids] if begins else prompt.ids
        rows.append(Row(ids + answer.ids, len(ids)))
    return rows


def batches(rows: list[Row]) -> Iterator[list[Row]]:
    """Rows of like length together, at most `TOKENS_PER_PASS` tokens of rows and padding in each batch."""
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        longest = len(batch[0].ids) if batch else len(row.ids)
        if (len(batch) + 1) * longest > TOKENS_PER_PASS or len(row.ids) < 0.7 * longest:
            yield batch
            batch = []
        batch.append(row)
    yield batch


def loss_of(model: LlamaForCausalLM, rows: list[Row], rng: random.Random) -> Tensor:
    """Cross entropy summed over the rows, each answer token weighted by the inverse root of its answer's length."""
    device = model.device
    ids_BT, mask_BT, weights_BT = _pad(rows)
    hidden_BTD = _hidden(model, ids_BT[:, :-1].to(device), _positions(rows, rng)[:, :-1].to(device))
    chosen_BT = mask_BT[:, 1:].to(device)
    logits_NV = model.lm_head(hidden_BTD[chosen_BT])
    losses_N = functional.cross_entropy(logits_NV.float(), ids_BT[:, 1:].to(device)[chosen_BT], reduction="none")
    return (losses_N * weights_BT[:, 1:].to(device)[chosen_BT]).sum()


@torch.inference_mode()
def exact_matches(model: LlamaForCausalLM, rows: list[Row]) -> float:
    """Part of the rows whose whole answer greedy decoding would write, end token included."""
    right = 0
    for batch in batches(rows):
        ids_BT, mask_BT, _ = _pad(batch)
        plain = torch.arange(ids_BT.shape[1]).expand_as(ids_BT)
        hidden_BTD = _hidden(model, ids_BT[:, :-1].to(model.device), plain[:, :-1].to(model.device))
        best_BT = model.lm_head(hidden_BTD).argmax(-1).cpu()
        right += int(((best_BT == ids_BT[:, 1:]) | ~mask_BT[:, 1:]).all(-1).sum())
    return right / len(rows)


class Trainer:
    """Owns the model, its float32 master weights and their optimizers."""

    def __init__(self, model: LlamaForCausalLM, learning_rate: float) -> None:
        self.model = model
        self._learning_rate = learning_rate
        self._parameters = list(model.parameters())
        self._masters = [p.detach().float().requires_grad_() for p in self._parameters]
        embedding = model.get_input_embeddings().weight
        matrices = [
            m for m, p in zip(self._masters, self._parameters, strict=True) if m.ndim == 2 and p is not embedding
        ]
        others = [m for m, p in zip(self._masters, self._parameters, strict=True) if m.ndim != 2 or p is embedding]
        self._averages = [master.detach().clone() for master in self._masters]
        # Muon on the matrices reaches the same loss in about half the steps of AdamW here
        self._optimizers: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
        )

    def step(self, rows: list[Row], rng: random.Random, rate: float) -> float:
        """One update at `rate` times the learning rate; the mean loss of the rows."""
        total = 0.0
        for batch in batches(rows):
            loss = loss_of(self.model, batch, rng) / len(rows)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        for master, parameter in zip(self._masters, self._parameters, strict=True):
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
            parameter.grad = None
        nn.utils.clip_grad_norm_(self._masters, 1.0)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self._learning_rate * rate
            optimizer.step()
        for master, parameter in zip(self._masters, self._parameters, strict=True):
            parameter.data.copy_(master.data)
        for average, master in zip(self._averages, self._masters, strict=True):
            average.lerp_(master.detach(), 1 - AVERAGE_DECAY)
        return total

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the model has the running average of its weights: far better while the learning rate is high."""
        for average, parameter in zip(self._averages, self._parameters, strict=True):
            parameter.data.copy_(average)
        yield
        for master, parameter in zip(self._masters, self._parameters, strict=True):
            parameter.data.copy_(master.data)


def train(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    *,
    seed: int,
    budget: Budget,
    learning_rate: float,
    report_every_s: float,
) -> Iterator[tuple[int, float]]:
    """Trains to the end of the budget; yields the step and the part done from time to time, and at the end.

    Between, while the caller holds the yielded pair, the model has its averaged weights.
    """
    rng = random.Random(seed)
    examples = stream(seed)
    trainer = Trainer(model, learning_rate)
    started = reported = time.monotonic()
    step, done, average = 0, 0.0, 0.0
    while done < 1:
        rows = encode(tokenizer, list(islice(examples, EXAMPLES_PER_STEP)), rng)
        loss = trainer.step(rows, rng, learning_rate_factor(done))
        average = loss if step == 0 else 0.98 * average + 0.02 * loss
        step += 1
        done = budget.progress(step, started)
        if time.monotonic() - reported > report_every_s or done >= 1:
            reported = time.monotonic()
            print(f"step {step}, {done:.0%}, {reported - started:.0f} s, loss {average:.4f}", flush=True)
            with trainer.averaged():
                yield step, done


def learning_rate_factor(done: float) -> float:
    """Warm-up, plateau and linear decay over the part of the run that is done."""
    return min(1.0, (done + 1e-3) / WARM_UP, max(0.0, (1 - done) / (1 - DECAY_FROM)))


def quick_scores(model: LlamaForCausalLM, tokenizer: Tokenizer, names: list[str], count: int) -> dict[str, float]:
    """Exact matches on the evaluation sets, from one forward pass each: a lower bound of the real score."""
    rng = random.Random(0)
    return {name: exact_matches(model, encode(tokenizer, held_out(name, count), rng)) for name in names}


def _hidden(model: LlamaForCausalLM, ids_BT: Tensor, positions_BT: Tensor) -> Tensor:
    # All ones: the padding is on the right, where causal attention never looks. Without a mask, transformers would take
    # the jumps in the positions for the borders of packed texts.
    mask_BT = torch.ones_like(ids_BT)
    hidden_BTD: Tensor = model.model(
        input_ids=ids_BT, attention_mask=mask_BT, position_ids=positions_BT, use_cache=False
    ).last_hidden_state
    return hidden_BTD


def _pad(rows: list[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, the mask of answer tokens and their weights, each `[B, T]`."""
    longest = max(len(row.ids) for row in rows)
    ids_BT = torch.zeros(len(rows), longest, dtype=torch.long)
    mask_BT = torch.zeros(len(rows), longest, dtype=torch.bool)
    weights_BT = torch.zeros(len(rows), longest)
    for i, row in enumerate(rows):
        end = len(row.ids)
        ids_BT[i, :end] = torch.tensor(row.ids)
        mask_BT[i, row.start : end] = True
        weights_BT[i, row.start : end] = (end - row.start) ** -0.5
    return ids_BT, mask_BT, weights_BT


def _positions(rows: list[Row], rng: random.Random) -> Tensor:
    """Positions with a jump before some turn of every fourth prompt: far turns at the price of short prompts.

    Source: PoSE, Zhu et al. 2023.
    """
    positions_BT = torch.arange(max(len(row.ids) for row in rows)).repeat(len(rows), 1)
    for i, row in enumerate(rows):
        turns = [at for at in range(row.start) if row.ids[at] == TURN_ID] or [1]
        if rng.random() < 0.25:
            positions_BT[i, rng.choice(turns) :] += rng.randrange(max(1, MAX_POSITIONS - len(row.ids)))
    return positions_BT
