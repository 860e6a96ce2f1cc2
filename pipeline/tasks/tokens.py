"""Losses of tokens under a language model, without ever holding the logits of a whole batch.

Shapes: B batch, T tokens, V vocabulary, D width, M tokens that have a loss.

A model's last layer multiplies every hidden state with the whole vocabulary: [B, T, V] logits, 49,152 x 4 bytes per token for a
model as small as SmolLM2-135M. So the layer is taken out for the forward pass (it hands on what it was given), and applied
afterwards to a few tokens at a time, and to those alone whose loss is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..batches import own_copy
from ..errors import ContractError
from ..forwards import replaced
from ..layers import entries_of
from ..numerics import to_loss_dtype
from ..observe import say
from .base import Batch, Uniforms
from .outputs import drawn_classes, halvings, logits_of

IGNORED = -100
"""Label of a token whose loss does not count: what Hugging Face's models mean by it too."""
CHUNK_BYTES = 16 << 20
"""Logits made at a time."""
CHECK_TOLERANCE = 1e-2
"""Largest difference of a token's loss from the model's own logits, in nats, in half precision; elsewhere a 100th of it."""
_Head = Callable[[Tensor], Tensor]
PROBED_TOKENS = 8
"""Of the first text that comes, on which a model is looked at."""
_heads: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_causal: WeakSet[nn.Module] = WeakSet()


def token_losses(model: nn.Module, inputs: Batch, label_BT: Tensor) -> Tensor:
    """Cross-entropy of every label, in nats: [B, T], float32 or better, 0 where the label is IGNORED.

    Args:
        model: Called as `model(**inputs)`; returns the logits [B, T, V], or an output that has them as `logits`.
        inputs: Its keyword arguments.
        label_BT: What the logits at the same place should say.
    """
    counted_BT = label_BT != IGNORED
    label_M = label_BT[counted_BT]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None and _is_plain(model, head, inputs):
        hidden_MD, row_M = _hidden(model, head, inputs)[counted_BT], counted_BT.nonzero()[:, 0]
        loss_M = _in_chunks(_with_extras(model, head), hidden_MD, label_M, row_M)
    else:
        loss_M = _cross_entropy(_logits(model, inputs)[counted_BT], label_M)
    loss_BT = torch.zeros(label_BT.shape, dtype=loss_M.dtype, device=loss_M.device)
    return loss_BT.masked_scatter(counted_BT, loss_M)


def drawn_tokens(model: nn.Module, inputs: Batch, label_BT: Tensor, uniforms: Uniforms) -> Tensor:
    """Labels [B, T] as the model would have them: each that is not IGNORED drawn from what it predicts there.

    Args:
        model: As `token_losses` takes it.
        inputs: As `token_losses` takes them.
        label_BT: Says what counts.
        uniforms: All randomness comes from it.
    """
    counted_BT = label_BT != IGNORED
    with torch.no_grad():
        logits_MV = _logits(model, inputs)[counted_BT]
        vocabulary = logits_MV.shape[-1]
        uniform_ML = uniforms(label_BT.shape[1], halvings(vocabulary))[counted_BT]
        size = max(1, CHUNK_BYTES // (vocabulary * 4))
        drawn = [
            drawn_classes(to_loss_dtype(piece_MV).softmax(dim=-1), uniform_mL)
            for piece_MV, uniform_mL in zip(logits_MV.split(size), uniform_ML.split(size), strict=True)
        ]
    return label_BT.masked_scatter(counted_BT, torch.cat(drawn))


def _logits(model: nn.Module, inputs: Batch) -> Tensor:
    return logits_of(model, model(**inputs))


def _cross_entropy(logits_MV: Tensor, label_M: Tensor) -> Tensor:
    return F.cross_entropy(to_loss_dtype(logits_MV), label_M, reduction="none")


def _in_chunks(head: _Head, hidden_MD: Tensor, label_M: Tensor, row_M: Tensor) -> Tensor:
    """Losses of M tokens of these rows; logits are made and forgotten a few at a time, and made again in a backward pass."""
    vocabulary = head(hidden_MD[:1]).shape[-1]
    size = max(1, CHUNK_BYTES // (vocabulary * 4))

    def losses(hidden: Tensor, labels: Tensor) -> Tensor:
        return _cross_entropy(head(hidden), labels)

    parts = []
    for start in range(0, len(label_M), size):
        piece = hidden_MD[start : start + size], label_M[start : start + size]
        again = torch.is_grad_enabled() and len(label_M) > size
        with entries_of(row_M[start : start + size]):
            parts.append(checkpoint(losses, *piece, use_reentrant=False) if again else losses(*piece))
    return torch.cat(parts) if parts else hidden_MD.new_zeros(0, dtype=torch.float32)


def _hidden(model: nn.Module, head: nn.Module, inputs: Batch) -> Tensor:
    """What the model hands its last layer: [B, T, D]."""
    with _taken_out(head) as handed:
        model(**inputs)
    return handed[0]


@contextmanager
def _taken_out(head: nn.Module) -> Iterator[list[Tensor]]:
    """A layer that keeps what it is given, and gives on one number for each token, for the time of the block."""
    handed: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        handed.append(hidden)
        return hidden[..., :1]

    with replaced({head: keep}):
        yield handed


def _with_extras(model: nn.Module, head: nn.Module) -> _Head:
    """The last layer with what some architectures do to its logits."""
    config = getattr(model, "config", None)
    scale = float(getattr(config, "logit_scale", None) or 1) / float(getattr(config, "logits_scaling", None) or 1)
    cap = getattr(config, "final_logit_softcapping", None)

    def logits(hidden: Tensor) -> Tensor:
        out = head(hidden)
        out = out * scale if scale != 1 else out
        return torch.tanh(out / cap) * cap if cap else out

    return logits


def _is_plain(model: nn.Module, head: nn.Module, inputs: Batch) -> bool:
    """Whether taking the last layer out gives the model's own losses: tried once, on the first tokens that come."""
    if model not in _heads:
        with _probing(model):
            _heads[model] = _agrees(model, head, _few(inputs))
        if not _heads[model]:
            say(
                f"warning: {type(model).__name__} makes its logits in a way of its own: they are held for whole batches"
            )
    return _heads[model]


def require_causal(model: nn.Module, inputs: Batch) -> None:
    """See that no logits depend on tokens behind them, else those of a padded batch would be others: tried once per model.

    Raises:
        ContractError: They do.
    """
    model = getattr(model, "stands_for", model)  # a stand-in of a model that is looked at
    if model in _causal:
        return
    ids_1T = _few(inputs)["input_ids"]
    others = ids_1T[ids_1T != ids_1T[0, -1]]
    if not len(others):  # one word again and again: the next batch will tell
        return
    changed_1T = ids_1T.clone()
    changed_1T[0, -1] = others[0]
    with _probing(model):
        before_TV, after_TV = (_logits(model, {"input_ids": ids})[0, :-1] for ids in (ids_1T, changed_1T))
    if not torch.allclose(before_TV, after_TV, rtol=0, atol=_tolerance(before_TV)):
        raise ContractError(
            f"{type(model).__name__} is not causal: its logits depend on tokens that come later",
            "a causal checkpoint is needed (in its config perhaps is_decoder: true)",
        )
    _causal.add(model)


def _few(inputs: Batch) -> Batch:
    return own_copy({name: value[:1, :PROBED_TOKENS] for name, value in inputs.items()})


def _tolerance(logits: Tensor) -> float:
    return CHECK_TOLERANCE if logits.dtype.itemsize < 4 else CHECK_TOLERANCE / 100


@contextmanager
def _probing(model: nn.Module) -> Iterator[None]:
    """A model without gradients, and without dropout where it is trained, for the time of the block."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _agrees(model: nn.Module, head: nn.Module, inputs: Batch) -> bool:
    logits_TV = _logits(model, own_copy(inputs))[0]
    label_T = logits_TV.argmax(dim=-1)
    try:
        hidden_TD = _hidden(model, head, inputs)[0]
        ours_T = _in_chunks(_with_extras(model, head), hidden_TD, label_T, torch.zeros_like(label_T))
    except (
        RuntimeError,
        TypeError,
        ValueError,
        IndexError,
    ):  # the rest of the model does not take one number per token
        return False
    return bool(torch.allclose(ours_T, _cross_entropy(logits_TV, label_T), rtol=0, atol=_tolerance(logits_TV)))
