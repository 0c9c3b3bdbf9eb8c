"""Target and drafter in plain PyTorch that round to bfloat16 where vLLM's layers on a CPU do: the
oracle of what is drafted in bfloat16.

The package's reference and transformers' Qwen3 round elsewhere: before a norm's weight, before the
norm of a sum, at each product of the rotary embedding, inside attention. Two correct computations
then differ in last bits, and a drafter's two best logits are often no further apart: one draft
token in fifty differs, and nothing says that this is rounding. With the same roundings one in two
hundred does. Reads a checkpoint's tensors by their names; calls no model of vLLM's, of ours or of
transformers'.
Limits: Qwen3 targets, rotary embedding without scaling, no sliding windows, no tables of the
drafter's own.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from vllm_dflash.reference.decoding import Draft

AT_LEAST = (
    0.99
    if torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()
    else 0.98
)
"""Share of draft tokens that have to be equal outright. Lower where this oracle comes less near or
was not run: with AVX2 V1 gave 0.9955 and 0.9940 for trained weights, 0.9932 (DFlash) and 0.9859
(DFlare) for random ones. With AVX-512 without bfloat16 it was emulated (0.9898), with AMX not run;
V2, not emulated, is half a point lower elsewhere."""


@dataclass(frozen=True)
class Kernels:
    """What the processor decides of how vLLM's own kernels (norms of the drafter, rotary,
    attention) round."""

    truncate: bool
    """Towards zero, where there are no instructions for bfloat16."""
    round_weights: bool
    """Whether attention rounds its weights before it multiplies the values by them: with AMX."""
    norm_context_keys: bool
    """Whether a kernel norms the context's keys: the V1 runner's on a CPU; the modules that V2
    calls do it in operators, rounded to nearest."""

    @classmethod
    def here(cls, *, norm_context_keys: bool) -> "Kernels":
        return cls(
            not torch.cpu._is_avx512_bf16_supported(),
            torch.cpu._is_amx_tile_supported(),
            norm_context_keys,
        )

    def round(self, x: Tensor) -> Tensor:
        """``x`` float32 to bfloat16."""
        return (
            (x.contiguous().view(torch.int32) & -(1 << 16)).view(torch.float32).bfloat16()
            if self.truncate
            else x.bfloat16()
        )


class _Model:
    """Weights of a checkpoint in bfloat16, and what target and drafter share. Between two roundings
    all is float32."""

    def __init__(self, folder: Path, kernels: Kernels) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.kernels = kernels
        self.raw = load_file(folder / "model.safetensors")
        self.tensors = {name: tensor.bfloat16() for name, tensor in self.raw.items()}

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def scale(self, x: Tensor) -> Tensor:
        """1 / rms of ``x`` [..., H]."""
        return torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.config["rms_norm_eps"])

    def norm(self, x: Tensor, name: str) -> Tensor:
        raise NotImplementedError

    def norm_of_sum(self, branch: Tensor, residual: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """The norm of a sum, and the sum, rounded."""
        raise NotImplementedError

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.config["head_dim"]))

    def attention(
        self, x: Tensor, name: str, positions: Tensor, context: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Causal without a ``context``; with one, every query sees it and all of its own block.
        ``x`` [Q, H] -> [Q, H]."""
        query, key, value = (self.heads(self.linear(x, f"{name}.{part}_proj")) for part in "qkv")
        query = self.rotated(self.norm(query, f"{name}.q_norm"), positions)
        key = self.rotated(self.norm(key, f"{name}.k_norm"), positions)
        if context is not None:
            key, value = torch.cat([context[0], key]), torch.cat([context[1], value])
        groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
        scores = (
            torch.einsum("qhd,khd->hqk", query.float(), key.float())
            * self.config["head_dim"] ** -0.5
        )
        if context is None:
            scores = scores.masked_fill(
                ~torch.ones(len(x), len(x), dtype=torch.bool).tril(), float("-inf")
            )
        # As an attention kernel does: the division comes last.
        weights = (scores - scores.max(-1, keepdim=True).values).exp()
        total = weights.sum(-1, keepdim=True)
        weights = self.kernels.round(weights).float() if self.kernels.round_weights else weights
        out = torch.einsum("hqk,khd->hqd", weights, value.float()) / total
        return self.linear(self.kernels.round(out.transpose(0, 1)).flatten(1), f"{name}.o_proj")

    def rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        """``x`` [S, heads, head_dim] by cosines and sines in bfloat16."""
        theta = self.config.get("rope_theta") or self.config["rope_parameters"]["rope_theta"]
        steps = torch.arange(0, x.shape[-1], 2, dtype=torch.float32) / x.shape[-1]
        angles = positions.float()[:, None, None] * theta**-steps
        cos, sin = angles.cos().bfloat16().float(), angles.sin().bfloat16().float()
        first, second = x.float().chunk(2, dim=-1)
        return self.kernels.round(
            torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        )

    def layer(
        self,
        branch: Tensor,
        residual: Tensor | None,
        name: str,
        positions: Tensor,
        context: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One decoder layer; the stream is ``branch`` + ``residual``, or ``branch`` alone at the
        first."""
        if residual is None:
            x, residual = self.norm(branch, f"{name}.input_layernorm"), branch
        else:
            x, residual = self.norm_of_sum(branch, residual, f"{name}.input_layernorm")
        attended = self.attention(x, f"{name}.self_attn", positions, context)
        x, residual = self.norm_of_sum(attended, residual, f"{name}.post_attention_layernorm")
        gate, up = self.linear(x, f"{name}.mlp.gate_proj"), self.linear(x, f"{name}.mlp.up_proj")
        return self.linear(F.silu(gate) * up, f"{name}.mlp.down_proj"), residual


class RoundedTarget(_Model):
    """Qwen3; its norms are vLLM's compiled ones: rounded before the weight, a sum not before its
    norm."""

    def __init__(self, folder: Path, kernels: Kernels) -> None:
        super().__init__(folder, kernels)
        self.embedding = self.tensors["model.embed_tokens.weight"]
        self.lm_head = (
            self.embedding if self.config["tie_word_embeddings"] else self.tensors["lm_head.weight"]
        )

    def norm(self, x: Tensor, name: str) -> Tensor:
        return (x.float() * self.scale(x)).bfloat16() * self.tensors[f"{name}.weight"]

    def norm_of_sum(self, branch: Tensor, residual: Tensor, name: str) -> tuple[Tensor, Tensor]:
        total = branch.float() + residual.float()
        return self.norm(total, name), total.bfloat16()

    def features(self, token_ids: Sequence[int], layer_ids: Sequence[int]) -> Tensor:
        """Outputs of the decoder layers ``layer_ids`` (zero-based), [S, T, H]."""
        branch, residual, kept = F.embedding(torch.tensor(token_ids), self.embedding), None, {}
        positions = torch.arange(len(token_ids))
        for i in range(self.config["num_hidden_layers"]):
            branch, residual = self.layer(branch, residual, f"model.layers.{i}", positions)
            kept[i] = branch + residual
        return torch.stack([kept[i] for i in layer_ids], dim=1)


class RoundedDrafter(_Model):
    """DFlash or DFlare; its norms are one kernel, rounded once, but that a sum's norm scales the
    rounded sum by the other's rms."""

    def __init__(self, folder: Path, kernels: Kernels) -> None:
        super().__init__(folder, kernels)
        self.own = self.config["dflash_config"]

    def norm(self, x: Tensor, name: str) -> Tensor:
        return self.kernels.round(self.wide_norm(x, name))

    def norm_of_sum(self, branch: Tensor, residual: Tensor, name: str) -> tuple[Tensor, Tensor]:
        total = branch.float() + residual.float()
        stored = self.kernels.round(total)
        return (
            self.kernels.round(
                stored.float() * self.scale(total) * self.tensors[f"{name}.weight"].float()
            ),
            stored,
        )

    def wide_norm(self, x: Tensor, name: str) -> Tensor:
        """Not rounded."""
        return x.float() * self.scale(x) * self.tensors[f"{name}.weight"].float()

    def context(self, features: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Every draft layer's keys and values [S, kv heads, head_dim] for ``features`` [S, T,
        H]."""
        positions, depth = torch.arange(len(features)), self.config["num_hidden_layers"]
        fusion = self.raw.get("layer_fusion_weights")
        if fusion is None:
            each, suffix = (
                [self.norm(self.linear(features.flatten(1), "fc"), "hidden_norm")] * depth,
                "",
            )
        else:
            fused = torch.einsum(
                "dt,sth->dsh", fusion.float().softmax(dim=1).bfloat16().float(), features.float()
            ).bfloat16()
            each, suffix = list(self.norm(fused, "hidden_norm")), "_target"
        found = []
        for i, c in enumerate(each):
            key, value = (
                self.heads(self.linear(c, f"layers.{i}.self_attn.{part}_proj{suffix}"))
                for part in "kv"
            )
            key = self.wide_norm(key, f"layers.{i}.self_attn.k_norm")
            key = self.kernels.round(key) if self.kernels.norm_context_keys else key.bfloat16()
            found.append((self.rotated(key, positions), value))
        return found

    def draft(
        self,
        target: RoundedTarget,
        token: int,
        anchor: int,
        context: list[tuple[Tensor, Tensor]],
        num_tokens: int,
        max_model_len: int | None,
    ) -> Draft:
        """The whole block after ``token`` at ``anchor``, as far as ``max_model_len``; its first
        ``num_tokens`` are taken."""
        size = (
            self.config["block_size"]
            if max_model_len is None
            else min(self.config["block_size"], max_model_len - anchor)
        )
        ids = torch.full((size,), self.own["mask_token_id"])
        ids[0] = token
        positions = torch.arange(anchor, anchor + size)
        branch, residual = F.embedding(ids, target.embedding), None
        for i, (key, value) in enumerate(context):
            branch, residual = self.layer(
                branch, residual, f"layers.{i}", positions, (key[:anchor], value[:anchor])
            )
        assert residual is not None
        hidden, _ = self.norm_of_sum(branch, residual, "norm")
        logits = F.linear(hidden[1 : num_tokens + 1], target.lm_head).float()
        best, second = logits.topk(2, dim=-1).values.unbind(-1)
        return Draft(anchor, logits.argmax(-1).tolist(), (best - second).tolist(), best.tolist())


@torch.inference_mode()
def replay_rounded(
    target: RoundedTarget,
    drafter: RoundedDrafter,
    token_ids: Sequence[int],
    anchors: Sequence[int],
    num_tokens: int,
    max_model_len: int | None = None,
) -> list[Draft]:
    """What is drafted in bfloat16 at the anchor positions of a committed sequence."""
    context = drafter.context(target.features(token_ids, drafter.own["target_layer_ids"]))
    return [
        drafter.draft(target, token_ids[n], n, context, num_tokens, max_model_len) for n in anchors
    ]
