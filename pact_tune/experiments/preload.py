"""Imported once by the process from which an experiment's commands are forked: what they would all import."""

import importlib

from pact_tune.log import quiet_torchao

quiet_torchao()
for _name in (
    "pact_lora_finetune",
    "pact_tune.tools.configs",
    "pact_tune.evaluation.report",
    "pact_tune.evaluation.harness",
):
    importlib.import_module(_name)
