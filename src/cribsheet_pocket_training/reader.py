"""Many questions about one text, side by side: the reader that the model is measured with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer

from cribsheet_pocket import INSTRUCTION, path
from cribsheet_pocket.quantize import load_folder


class Reader:
    """The model with the documents read once, for many questions side by side.

    Written out here because the usual cache copies itself for every token and every question, which on two cores takes
    longer than the model.  A test holds it to the answers of `transformers`.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.device = torch.device(device)
        with_tokenizer = folder if (folder / "tokenizer.json").exists() else path()  # training writes weights alone
        self.tokenizer: Any = AutoTokenizer.from_pretrained(with_tokenizer)
        self.end = self.tokenizer.eos_token_id
        c = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.layers, self.heads, self.head = c["num_hidden_layers"], c["num_key_value_heads"], c["head_dim"]
        self.rate = c["rope_theta"] ** (-torch.arange(0, self.head, 2).double() / self.head)
        self.weights = {k.removeprefix("model."): v.float().to(device) for k, v in load_folder(folder).items()}

    def prompt(self, text: str) -> tuple[str, str]:
        """The rendered prompt of a user turn, cut where its question begins."""
        whole = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{text}\0"}], tokenize=False, add_generation_prompt=True
        )
        left, right = whole.split("\0")
        return left, right

    def ids(self, text: str) -> Tensor:
        """Token ids (T,)."""
        found: Tensor = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
        return found

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weights[f"{name}.weight"], 1e-5)

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary embedding of x (B, T, heads, D) by angles (B, T, 1, D)."""
        half = self.head // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    def _forward(
        self,
        ids: Tensor,
        positions: Tensor,
        mask: Tensor,
        prefix: list[tuple[Tensor, Tensor]],
        own: list[tuple[Tensor, Tensor]],
    ) -> Tensor:
        """Hidden states (B, T, width) of ids (B, T) after a shared prefix (K, S, D) and rows' own keys (B, K, U, D).

        `own` grows by the new tokens; `mask` (B, T, U + T) says which of a row's own tokens each new one sees.
        """
        x = F.embedding(ids.to(self.device), self.weights["embed_tokens.weight"])
        mask = mask.to(self.device)
        batch, new = ids.shape
        angle = (positions[..., None, None].double() * self.rate).repeat(1, 1, 1, 2)
        cos, sin = angle.cos().float().to(self.device), angle.sin().float().to(self.device)
        for i in range(self.layers):
            at = f"layers.{i}.self_attn."
            h = self._norm(x, f"layers.{i}.input_layernorm")
            q, k, v = (self._linear(h, at + n).view(batch, new, -1, self.head) for n in ("q_proj", "k_proj", "v_proj"))
            q, k = self._turn(q, cos, sin) / self.head**0.5, self._turn(k, cos, sin)
            keys = torch.cat([own[i][0], k.transpose(1, 2)], 2)  # (B, K, U + T, D)
            values = torch.cat([own[i][1], v.transpose(1, 2)], 2)
            own[i] = (keys, values)
            q = q.view(batch, new, self.heads, -1, self.head).permute(2, 0, 3, 1, 4)  # (K, B, G, T, D)
            far = (q.flatten(1, 3) @ prefix[i][0].mT).view(*q.shape[:4], -1)  # (K, B, G, T, S)
            near = torch.einsum("kbgtd,bkud->kbgtu", q, keys).masked_fill(~mask[None, :, None], float("-inf"))
            share = torch.cat([far, near], -1).softmax(-1)
            size = far.shape[-1]
            o = (share[..., :size].flatten(1, 3) @ prefix[i][1]).view(q.shape)
            o = o + torch.einsum("kbgtu,bkud->kbgtd", share[..., size:], values)
            x = x + self._linear(o.permute(1, 3, 0, 2, 4).reshape(batch, new, -1), at + "o_proj")
            h, m = self._norm(x, f"layers.{i}.post_attention_layernorm"), f"layers.{i}.mlp."
            x = x + self._linear(
                F.silu(self._linear(h, m + "gate_proj")) * self._linear(h, m + "up_proj"), m + "down_proj"
            )
        return self._norm(x, "norm")

    def _nothing(self, rows: int | None) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of no tokens, of a prefix or of `rows` rows."""
        sizes = (self.heads, 0, self.head) if rows is None else (rows, self.heads, 0, self.head)
        empty = torch.zeros(sizes, device=self.device)
        return [(empty, empty)] * self.layers

    def _read(self, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values (K, S, D) of each layer for ids (S,)."""
        prefix = self._nothing(None)
        for start in range(0, len(ids), 512):
            part = ids[None, start : start + 512]
            new = part.shape[1]
            own = self._nothing(1)
            self._forward(
                part,
                torch.arange(start, start + new)[None],
                torch.ones(1, new, new, dtype=torch.bool).tril(),
                prefix,
                own,
            )
            prefix = [
                (torch.cat([a, k[0]], 1), torch.cat([b, v[0]], 1)) for (a, b), (k, v) in zip(prefix, own, strict=True)
            ]
        return prefix

    @torch.inference_mode()
    def answers(self, documents: str, questions: Sequence[str], most: int = 160) -> tuple[int, list[str]]:
        """Tokens of the documents' prompt, and a greedy answer of at most `most` tokens to each question."""
        left, right = self.prompt(f"{INSTRUCTION}\n\n{documents}\n\n" if documents else f"{INSTRUCTION}\n\n")
        ids = self.ids(left)
        prefix = self._read(ids)
        together = max(1, 100_000 // len(ids))
        order = sorted(range(len(questions)), key=lambda i: len(questions[i]))
        found = [""] * len(questions)
        for start in range(0, len(order), together):
            part = order[start : start + together]
            for i, answer in zip(part, self._batch(prefix, [questions[i] + right for i in part], most), strict=True):
                found[i] = answer
        return len(ids), found

    def _batch(self, prefix: list[tuple[Tensor, Tensor]], texts: Sequence[str], most: int) -> list[str]:
        """Greedy continuations of the prefix and each text, side by side (padded on the left)."""
        ids = [self.ids(t) for t in texts]
        longest, read = max(map(len, ids)), prefix[0][0].shape[1]
        lengths = torch.tensor([len(x) for x in ids])
        following = torch.stack([F.pad(x, (longest - len(x), 0)) for x in ids])  # (B, longest)
        real = torch.arange(longest)[None] >= (longest - lengths)[:, None]
        diagonal = torch.eye(longest, dtype=torch.bool)
        mask = (real[:, None, :] & torch.ones(longest, longest, dtype=torch.bool).tril()) | diagonal
        positions = read + (torch.arange(longest)[None] - (longest - lengths)[:, None]).clamp(min=0)
        own = self._nothing(len(texts))
        answers: list[list[int]] = [[] for _ in texts]
        open_ = list(range(len(texts)))
        for _ in range(most):
            hidden = self._forward(following, positions, mask, prefix, own)[:, -1]
            token = F.linear(hidden, self.weights["embed_tokens.weight"]).argmax(-1).cpu()  # (B,)
            going = (token != self.end).nonzero()[:, 0]  # rows whose answer has not ended
            open_ = [open_[i] for i in going.tolist()]
            if not open_:
                break
            token, positions, real = token[going], positions[going, -1:] + 1, F.pad(real[going], (0, 1), value=True)
            for i, t in zip(open_, token.tolist(), strict=True):
                answers[i].append(t)
            kept = going.to(self.device)
            own = [(k[kept], v[kept]) for k, v in own]
            following, mask = token[:, None], real[:, None, :]
        return [self.tokenizer.decode(a) for a in answers]

    @torch.inference_mode()
    def loss(self, texts: Sequence[str]) -> float:
        """Mean cross-entropy per token over texts."""
        total = count = 0.0
        for text in texts:
            ids = self.ids(text)
            n = len(ids)
            seen = torch.ones(1, n, n, dtype=torch.bool).tril()
            hidden = self._forward(ids[None], torch.arange(n)[None], seen, self._nothing(None), self._nothing(1))
            logits = F.linear(hidden[0, :-1], self.weights["embed_tokens.weight"])
            total += float(F.cross_entropy(logits, ids[1:].to(self.device), reduction="sum"))
            count += n - 1
        return total / count
