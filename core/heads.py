"""What turns the decoder's output into an answer: next-token logits, or classes of a sequence or of each token."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmx.core.config import ModelConfig
from lmx.core.errors import UsageError
from lmx.core.layers.linear import linear
from lmx.core.native.griffin import can_cap, soft_cap

HeadKind = Literal["causal", "none", "sequence", "token"]

IGNORED_LABEL = -100


class CausalHead(nn.Module):
    """Logits of the next token: a matrix of its own, or the embedding's where the config ties them."""

    def __init__(self, config: ModelConfig, *, tied: bool) -> None:
        super().__init__()
        self.soft_cap = config.logits_soft_cap
        self.weight = None if tied else nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """hidden: [batch, length, hidden] -> [batch, length, vocab]."""
        weight = embedding if self.weight is None else self.weight
        return self.capped(linear(hidden.to(weight.dtype), weight))

    def capped(self, logits: Tensor) -> Tensor:
        """Logits squashed to (-soft_cap, soft_cap), where the config has one."""
        if self.soft_cap is None:
            return logits
        if can_cap(logits):
            return soft_cap(logits, self.soft_cap)
        return torch.tanh(logits / self.soft_cap) * self.soft_cap

    def reset_parameters(self, std: float) -> None:
        """Normal weights, if they are its own."""
        if self.weight is not None:
            nn.init.normal_(self.weight, 0.0, std)

    @staticmethod
    def loss(logits: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
        """Mean cross entropy of predicting each label from the tokens before it; labels of -100 do not count.

        Nor does the first token after left padding: nothing real stands before it (transformers scores it by what the
        padding answers). logits: [batch, length, vocab]; labels: [batch, length]; mask: the same, False for padding.
        """
        predictions, labels = logits[:, :-1].float().flatten(0, 1), labels[:, 1:].to(logits.device)
        if mask is not None:
            labels = labels.masked_fill(~mask[:, :-1].to(labels.device), IGNORED_LABEL)
        return F.cross_entropy(predictions, labels.flatten(), ignore_index=IGNORED_LABEL)


class ClassHead(nn.Module):
    """A linear layer to class scores. As transformers has it, that of tokens has a bias and, in training, dropout."""

    def __init__(self, config: ModelConfig, *, of_tokens: bool) -> None:
        super().__init__()
        self.dropout = config.classifier_dropout if of_tokens else 0.0
        self.score = nn.Linear(config.hidden_size, config.labels, bias=of_tokens)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: [batch, length, hidden] -> [batch, length, labels]."""
        hidden = F.dropout(hidden.to(self.score.weight.dtype), self.dropout, self.training)
        scores: Tensor = self.score(hidden)
        return scores

    def reset_parameters(self, std: float) -> None:
        """Normal weights, zero bias."""
        nn.init.normal_(self.score.weight, 0.0, std)
        if self.score.bias is not None:
            nn.init.zeros_(self.score.bias)


def last_real_token(
    input_ids: Tensor | None, mask: Tensor | None, pad_id: int | None, length: int, batch: int
) -> Tensor:
    """The column that a sequence is judged by: its last that is no padding. Returns [batch].

    mask: as the caller gave it. Known from it, else from the padding token. Raises UsageError for a batch where neither
    is known.
    """
    if mask is None and (pad_id is None or input_ids is None):
        if batch > 1:
            raise UsageError(
                "a batch of sequences needs an attention_mask or a config with pad_token_id",
                "Pass attention_mask, with 0 for padding.",
            )
        return torch.full((batch,), length - 1)
    real = (
        mask[:, -length:].bool() if mask is not None else torch.ne(torch.as_tensor(input_ids), torch.as_tensor(pad_id))
    )
    columns = torch.arange(length, device=real.device)
    return (columns * real).argmax(-1)


def infer_problem(classes: int, labels: Tensor) -> str:
    """What transformers takes the labels for: numbers to come near to, class numbers, or yes and no for each class."""
    if classes == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def sequence_loss(scores: Tensor, labels: Tensor, problem: str | None) -> Tensor:
    """Squared error, cross entropy, or one yes-or-no question a class; by the labels' dtype where no problem is named.

    scores: [batch, classes]; labels: [batch], or [batch, classes] of numbers or of yes (1) and no (0).
    """
    labels, problem = labels.to(scores.device), problem or infer_problem(scores.shape[-1], labels)
    if problem == "single_label_classification":
        return F.cross_entropy(scores, labels.long().view(-1), ignore_index=IGNORED_LABEL)
    labels = labels.to(scores.dtype).view_as(scores)
    if problem == "regression":
        return F.mse_loss(scores, labels)
    return F.binary_cross_entropy_with_logits(scores, labels)


def token_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy over the tokens with a label other than -100. scores: [batch, length, labels]."""
    return F.cross_entropy(scores.float().flatten(0, 1), labels.flatten().to(scores.device), ignore_index=IGNORED_LABEL)
