"""The stage before WRPO: fine-tuning on the source responses.

    loss = -(sum of log-probs of all response tokens) / (number of response tokens)        over one optimizer step

Every token of a step counts alike, across micro-batches and ranks.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from wrpo.data import SFTCollator
from wrpo.data.batch import OF_SFT, lengths_on_host, num_counted, response_lengths
from wrpo.data.collation import Batch
from wrpo.head.attention import model_inputs
from wrpo.head.fused_head import run_in_head
from wrpo_kernels import LikelihoodOutput, linear_nll_loss

from .config import SFTConfig
from .head_trainer import HeadTrainer
from .metrics import Measured


class SFTTrainer(HeadTrainer):
    """Supervised fine-tuning with the fused head.

    Args:
        model: a folder, a hub name, a causal language model of transformers, or a PEFT model.
        args: `SFTConfig`.
        train_dataset, eval_dataset: a file, a list or a `datasets.Dataset` of rows in any form of `wrpo.data.forms`, or
            rows of `wrpo.data.tokenize_examples`; eval_dataset may be a dict of several.
        processing_class: the tokenizer, saved with the model; its padding token fills the batches. Default: the one
            that lies with a model given by name.
        peft_config: of an adapter that the model gets. Default: none.
        data_collator: rows to a batch. Default: `SFTCollator`, each row's best answer.
        **options: of `transformers.Trainer`.

    Logs loss in nats a token.
    """

    of_batch = OF_SFT
    stage = "sft"
    config_class = SFTConfig

    def collator(self, args: SFTConfig, train_dataset: Any, pad_token_id: int) -> SFTCollator:
        return SFTCollator(pad_token_id)

    def item_weight(self, batch: Batch) -> Tensor:
        return response_lengths(batch).float()

    def batch_loss(self, model: nn.Module, batch: Batch, count: Tensor | None) -> tuple[Tensor, dict[str, Measured]]:
        labels = batch["labels"]
        options = {
            **self.args.head_options(),
            "cu_seqlens": batch.get("cu_seqlens"),
            "lengths": lengths_on_host(batch),
            "num_rows": num_counted(batch),
            "seq_weight": batch["is_counted"].float() if "is_counted" in batch else None,
            "normalizer": 1.0 if count is None else count,
        }

        def head_fn(hidden: Tensor, weight: Tensor, **head: Any) -> LikelihoodOutput:
            return linear_nll_loss(hidden, weight, labels, **head, **options)

        out = run_in_head(model, head_fn, **model_inputs(batch))
        if count is None:
            tokens = self.item_weight(batch)
            return out.loss, {"loss": Measured(-out.logp / tokens.clamp(min=1), tokens > 0)}
        return out.loss, {}
