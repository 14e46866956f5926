"""`atoll plan`: what a run will take before it starts."""

from pathlib import Path
from typing import Annotated

import typer

from launch.given import Config, Overrides
from pretrain.config.check import check_has_silo
from pretrain.config.errors import ConfigError


def plan(
    config: Config,
    overrides: Overrides = None,
    *,
    bandwidth: Annotated[str, typer.Option(help="Of a silo's link, in each direction: 100mbit, 2.5gbit.")],
    latency: Annotated[float, typer.Option(help="Seconds to the store (or another silo) and back.")] = 0.05,
    tokens_per_second: Annotated[
        float | None, typer.Option(help="That each silo trains on; default: measured here.")
    ] = None,
    measured: Annotated[
        Path | None, typer.Option(help="Directory of an earlier run on these machines, instead of a number.")
    ] = None,
    card: Annotated[str, typer.Option(help="That each rank has, by torch's name, instead of a number.")] = "",
    mfu: Annotated[float, typer.Option(help="With --card: the share of its peak that training makes use of.")] = 0.4,
    tokens: Annotated[float | None, typer.Option(help="Budget of all silos; default: what the run trains on.")] = None,
) -> None:
    """Say what a run will take before it starts: bytes, seconds, memory; and which ways to sync would be better.

    Without --tokens-per-second, --measured and --card it trains 20 steps of each silo here, and keeps nothing of them.

    [bold]Example:[/bold] atoll plan --config run.yaml --bandwidth 100mbit
    """
    from launch.show import plan as planning
    from launch.start.measuring import measure_silos
    from pretrain.config.load import load_config
    from pretrain.plan.plan import make_plan
    from pretrain.plan.seconds import Given, card_speeds, parse_bandwidth

    checked, bits_per_second = load_config(config, overrides or []), parse_bandwidth(bandwidth)
    check_has_silo(checked)
    for option, number, minimum in (("--latency", latency, 0.0), ("--tokens", tokens, 1.0)):
        if number is not None and not minimum <= number < float("inf"):
            raise ConfigError(f"{option}: {number:g} given; allowed: {minimum:g} or more")
    ways = {"--tokens-per-second": tokens_per_second is not None, "--measured": measured, "--card": card}
    if len(told := [option for option, value in ways.items() if value]) > 1:
        raise ConfigError(f"{told[0]}: it and {told[1]} given; allowed: one of {', '.join(ways)}, or none")
    factor, known = 1.0, dict[str, float]()
    if measured:
        known, factor = planning.measured_run(measured)
    elif card:
        known = card_speeds(checked, card, mfu)
    elif tokens_per_second is None:
        known = measure_silos(checked)
    given = Given(
        link_bits_per_second=bits_per_second,
        latency_seconds=latency,
        tokens_per_second=planning.tokens_per_second(list(checked.silos), tokens_per_second, known),
        work_factor=factor,
    )
    planning.print_plan(make_plan(checked, given, budget_tokens=round(tokens) if tokens else None))
