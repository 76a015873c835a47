"""What a trainer writes down for the paper's figures, when it is asked to (section ``analysis``): ``analysis.jsonl``."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pact_tune.batching import collate
from pact_tune.data import ChatDataset, chat_dataset
from pact_tune.decoder import Decoder
from pact_tune.evaluation.records import Record, write_analysis
from pact_tune.objectives.base import Context, Objective
from pact_tune.objectives.tokens import TokenSource
from pact_tune.reference.readings import Columns
from pact_tune.reference.source import ReferenceSource

POSITIONS = 4  # response positions of Figure 7
Loss = Callable[[list[int], float], tuple[torch.Tensor, torch.Tensor]]


class Analysis:
    """Looks at a model before the first step and after each epoch; every rank computes the same, rank 0 writes.

    Args:
        section (Any): ``source``, ``safety_tokens`` and ``rows`` of :class:`pact_tune.config.AnalysisSettings`.
        context (Context): of the run.
        decoder (Decoder): of the network in training.
        dataset (ChatDataset): the training data.
        used (Sequence[int]): numbers of the conversations that the run uses.
        objective (Objective): of the run.
        loss (Loss): loss and terms, summed over positions, of the conversations of these numbers.
        reference (ReferenceSource): of the run.
        folder (Path | None): where the records go; None: nothing is written.

    Raises:
        UserError: the prompts or the safety tokens cannot be read.
    """

    def __init__(
        self,
        section: Any,
        context: Context,
        decoder: Decoder,
        dataset: ChatDataset,
        used: Sequence[int],
        objective: Objective,
        loss: Loss,
        reference: ReferenceSource,
        folder: Path | None,
    ) -> None:
        tokens, _ = TokenSource(section.safety_tokens).load(context)
        # With the tail, whether the loss constrains these tokens or not.
        self.columns = Columns(tokens.ids.to(context.device), tail=True)
        self.prompts = chat_dataset(context.tokenizer, section.source).conversations
        self.samples = dataset.first_of_each(section.rows, set(used))
        self.decoder, self.rows, self.objective = decoder, dataset.conversations, objective
        self.loss, self.reference, self.folder = loss, reference, folder

    @torch.no_grad()
    def look(self, step: int, epoch: int) -> None:
        """Writes the records of one moment; all ranks must call it.

        Args:
            step (int): optimiser steps done.
            epoch (int): epochs done; 0: the initial model.
        """
        training = self.decoder.model.training
        self.decoder.model.eval()
        probability, logits = self._on_prompts()
        records: list[Record] = [{"kind": "confidence", "step": step, "probability": probability}]
        records += [{"kind": "logits", "epoch": epoch, "t": t, "mean": mean} for t, mean in enumerate(logits)]
        for source, rows in self.samples.items():
            records += [{"kind": "sample", "step": step, "source": source, **self._of_row(row)} for row in rows]
        self.decoder.model.train(training)
        if self.folder is not None:
            write_analysis(self.folder, records)

    def _of_row(self, row: int) -> Record:
        tokens = self.rows[row].num_response_tokens
        self.reference.fill_lazily([row])
        _, summed = self.loss([row], 1.0)
        terms = dict(zip(self.objective.names, (summed / tokens).tolist(), strict=True))
        constraint = next((value for name, value in terms.items() if name not in ("ce", "gate")), None)
        return {"row": row, "tokens": tokens, "ce": terms["ce"], "kl": constraint}

    def _on_prompts(self) -> tuple[float, list[float]]:
        """Probability of all safety tokens at position 0, and their mean logit at the first positions."""
        at_first: list[torch.Tensor] = []
        logits: list[list[torch.Tensor]] = [[] for _ in range(POSITIONS)]
        for prompt in self.prompts:
            batch = collate([prompt], self.decoder.pad_id).to(self.decoder.device)
            read = self.decoder.run(
                batch,
                lambda hidden, head, labels=batch.labels: self.columns.of_student(hidden, head, labels)[1],  # type: ignore[misc]  # a default
            )
            for t, columns in zip(batch.position.tolist(), read, strict=True):
                if t < POSITIONS:
                    logits[t].append(columns[:-1].mean())
                if t == 0:
                    at_first.append(1 - columns.softmax(-1)[-1])
        return torch.stack(at_first).mean().item(), [torch.stack(of_t).mean().item() for of_t in logits if of_t]
