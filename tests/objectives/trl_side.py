"""TRL's own loss methods, in float64, on the log-probabilities of a batch of `pairs`; trl is imported on first use.

Each function gives (loss, metrics, gradient of the loss [B, T]). The trainers are stand-ins that hold options; the
methods are TRL's. `test_trainers.py` runs the real trainers, models included.
"""

from collections import defaultdict
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from tests.objectives.pairs import Batch

Answer = tuple[float, dict[str, float], np.ndarray]


class _Answers:
    """The branches of all real pairs, each as a row of tokens: first branches, then second ones."""

    def __init__(self, logprob_BT: np.ndarray, batch: Batch):
        self.leaf = torch.tensor(logprob_BT, dtype=torch.float64, requires_grad=True)
        self.places = [(b, p) for b, p in np.ndindex(batch["pair_weight"].shape) if batch["pair_weight"][b, p]]
        counted = batch["loss_weight"] > 0
        spans = [
            b * counted.shape[1] + np.flatnonzero((batch["branches"][b] == 1 + 2 * p + branch) & counted[b])
            for branch in (0, 1)
            for b, p in self.places
        ]
        width = max(map(len, spans))
        index = torch.tensor(np.stack([np.pad(span, (0, width - len(span))) for span in spans]))
        self.mask = torch.tensor([[i < len(span) for i in range(width)] for span in spans])
        self.tokens = self.leaf.flatten()[index] * self.mask
        self.with_prompt = torch.cat([torch.zeros(len(spans), 1, dtype=torch.long), self.mask.long()], 1)

    def of(self, values_BP: np.ndarray) -> torch.Tensor:
        return torch.tensor([float(values_BP[place]) for place in self.places], dtype=torch.float64)

    def means(self) -> tuple[torch.Tensor, ...]:
        return (self.tokens.sum(1) / self.mask.sum(1)).chunk(2)

    def nll(self) -> torch.Tensor:
        half = len(self.places)
        return -self.tokens[:half].sum() / self.mask[:half].sum()

    def answer(self, loss: torch.Tensor, metrics: Any) -> Answer:
        loss.backward()
        grad = self.leaf.grad
        assert grad is not None
        values = {name: value[-1] if isinstance(value, list) else value for name, value in metrics.items()}
        return float(loss.detach()), {name: float(value) for name, value in values.items()}, grad.numpy()


def _trainer(**options: Any) -> Any:
    same = lambda tensor: tensor  # noqa: E731
    return SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same),
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **options,
    )


def _outputs(tokens: torch.Tensor) -> Any:
    zeros = torch.zeros_like(tokens)
    return SimpleNamespace(log_probs=tokens, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def dpo(logprob_BT: np.ndarray, batch: Batch, loss_type: Any, loss_weights: Any = None, **options: Any) -> Answer:
    """DPOTrainer's loss."""
    from trl.trainer.dpo_trainer import DPOTrainer

    answers = _Answers(logprob_BT, batch)
    options = {"beta": 0.1, "label_smoothing": 0.0, "discopop_tau": 0.05} | options
    trainer = _trainer(
        loss_types=list(loss_type),
        loss_weights=list(loss_weights or [1.0] * len(loss_type)),
        args=SimpleNamespace(discopop_tau=options.pop("discopop_tau")),
        ld_alpha=None,
        use_weighting=False,
        f_divergence_type="reverse_kl",
        **options,
    )
    inputs = {
        "input_ids": torch.zeros_like(answers.with_prompt),
        "attention_mask": answers.with_prompt,
        "completion_mask": answers.with_prompt,
        "ref_chosen_logps": answers.of(batch["ref_first"]),
        "ref_rejected_logps": answers.of(batch["ref_second"]),
    }
    loss = DPOTrainer._compute_loss(trainer, lambda **_: _outputs(answers.tokens), inputs, False)
    return answers.answer(loss, trainer._metrics["train"])


def cpo(logprob_BT: np.ndarray, batch: Batch, loss_type: str, ratios: bool = False, **options: Any) -> Answer:
    """CPOTrainer's loss on means per token; with `ratios`, on log-ratios to the reference in place of log-probabilities."""
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    answers = _Answers(logprob_BT, batch)
    chosen, rejected = answers.means()
    if ratios:
        chosen, rejected = answers.tokens.sum(1).chunk(2)
        chosen, rejected = chosen - answers.of(batch["ref_first"]), rejected - answers.of(batch["ref_second"])
    options = {"beta": 0.1, "label_smoothing": 0.0, "simpo_gamma": 0.5, "cpo_alpha": 0.0} | options
    trainer = _trainer(loss_type=loss_type, alpha=0.0, **options)
    trainer.cpo_loss = partial(CPOTrainer.cpo_loss, trainer)
    trainer.concatenated_forward = lambda *_: (chosen, rejected, chosen, rejected, answers.nll())
    return answers.answer(*CPOTrainer.get_batch_loss_metrics(trainer, None, {}))  # type: ignore[arg-type]


def orpo(logprob_BT: np.ndarray, batch: Batch, beta: float = 0.1) -> Answer:
    """ORPOTrainer's loss, with the NLL of answers only."""
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    answers = _Answers(logprob_BT, batch)
    chosen, rejected = answers.means()
    trainer = _trainer(beta=beta)
    trainer.odds_ratio_loss = partial(ORPOTrainer.odds_ratio_loss, trainer)
    trainer.concatenated_forward = lambda *_: (chosen, rejected, chosen, rejected, answers.nll())
    return answers.answer(*ORPOTrainer.get_batch_loss_metrics(trainer, None, {}))  # type: ignore[arg-type]


def kto(logprob_BT: np.ndarray, batch: Batch, loss_type: str = "kto", **options: Any) -> Answer:
    """KTOTrainer's loss."""
    from trl.trainer.kto_trainer import KTOTrainer

    answers = _Answers(logprob_BT, batch)
    half = len(answers.places)
    options = {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0} | options
    trainer = _trainer(loss_type=loss_type, calculate_KL=loss_type == "kto", **options)
    trainer._compute_kl_logps = lambda *_: answers.tokens[half:].sum(1).detach()
    inputs = {
        "input_ids": torch.zeros_like(answers.with_prompt[:half]),
        "attention_mask": answers.with_prompt[:half],
        "completion_mask": answers.with_prompt[:half],
        "ref_logps": answers.of(batch["ref_first"]),
        "ref_KL_logps": answers.of(batch["ref_second"]),
        "label": answers.of(batch["labels"]) > 0,
    }
    loss = KTOTrainer._compute_loss(trainer, lambda **_: _outputs(answers.tokens[:half]), inputs, False)
    return answers.answer(loss, trainer._metrics["train"])


def without_reference(loss_type: str, model: Any, rows: list[tuple[list[int], list[list[int]]]]) -> tuple[float, Any]:
    """Loss and metrics of CPOTrainer (simpo) or ORPOTrainer on (prompt, (chosen, rejected)) token ids; beta 0.5."""
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    batch = {}
    for which, name in enumerate(("chosen", "rejected")):
        texts = [torch.tensor([*prompt, *answers[which]]) for prompt, answers in rows]
        labels = [torch.tensor([-100] * len(prompt) + answers[which]) for prompt, answers in rows]
        padded = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        batch[f"{name}_input_ids"] = padded(texts)
        batch[f"{name}_attention_mask"] = padded([torch.ones_like(text) for text in texts])
        batch[f"{name}_labels"] = padded(labels, padding_value=-100)
    options = {"loss_type": loss_type, "beta": 0.5, "alpha": 0.0, "label_smoothing": 0.0, "simpo_gamma": 0.5, "cpo_alpha": 0.2}
    trainer = _trainer(is_encoder_decoder=False, pad_token_id=0, padding_value=0, **options)
    kind: Any = CPOTrainer if loss_type == "simpo" else ORPOTrainer
    trainer.concatenated_inputs, trainer.get_batch_logps = kind.concatenated_inputs, kind.get_batch_logps
    for method in ("concatenated_forward", "cpo_loss" if loss_type == "simpo" else "odds_ratio_loss"):
        setattr(trainer, method, partial(getattr(kind, method), trainer))
    with torch.no_grad():
        loss, metrics = kind.get_batch_loss_metrics(trainer, model, batch)
    return float(loss), metrics
