"""The operator's own judgement of a candidate: its loss on the public splits of a contract's gate."""

from functools import partial
from pathlib import Path

from torch import nn

from pretrain.config.keys import OPERATOR, RunConfig
from pretrain.exchange.gated import Gated, told_losses
from pretrain.exchange.store import StoreExchange
from pretrain.exchange.words import Evaluation
from pretrain.federation.export import empty_model, finished, origin
from pretrain.federation.held_out import evaluate_model
from pretrain.outer.state import OuterState
from pretrain.silo.shards import template_sha256, tokenizer_sha256


def judge_public(config: RunConfig, exchange: StoreExchange, state: OuterState) -> None:
    """Tell the loss of the newest version, whose parameters are in memory, on the public splits; once.

    It takes the memory of a whole model beside the outer state. Raises ConfigError.
    """
    gated, digest = Gated(exchange, config.gate), state.parameters_digest
    if gated.result(OPERATOR, state.version, digest):
        return
    found = evaluate_model(
        partial(_model, config, state),
        {name: Path(config.gate.places[name]) for name in sorted(config.gate.public)},
        origin(config),
        tokenizer_sha256(config.tokenizer_file),
        template=template_sha256(config.template_file),
        num_sequences=config.gate.eval_sequences,
    )
    result = Evaluation(
        version=state.version,
        parameters_digest=digest,
        losses=told_losses({name: one.loss for name, one in found.items()}),
        sequences={name: float(one.num_sequences) for name, one in found.items()},
    )
    gated.tell(OPERATOR, result)


def _model(config: RunConfig, state: OuterState) -> nn.Module:
    model, parameters = empty_model(config)
    for name, parameter in parameters.items():
        parameter.data.copy_(state.parameters[name])
    return finished(model, config)
