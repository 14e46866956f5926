"""`atoll contract`: read what was agreed, compare it with one's own, propose, sign and amend it."""

from typing import TYPE_CHECKING, Annotated

import typer

from launch.given import Config, Overrides
from pretrain.config.errors import named

if TYPE_CHECKING:
    from pretrain.exchange.amended import Proposal
    from pretrain.federation.contract import Agreed

app = typer.Typer(
    name="contract",
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="What all members agree to: show, check, propose, sign and amend it.",
)

Store = Annotated[str, typer.Argument(metavar="STORE", help="URL of the store, or a run directory with one in it.")]
Member = Annotated[str, typer.Option("--silo", help="The member who signs: a silo of the roster, or aggregator.")]


@app.command()
def show(store: Store) -> None:
    """Show the contract in plain words: terms, members and their keys, who has signed, amendments.

    [bold]Example:[/bold] atoll contract show s3://bucket/run
    """
    from pretrain.federation.contract import Agreed

    _print(Agreed.at(store))


@app.command()
def check(store: Store, config: Config, overrides: Overrides = None) -> None:
    """Compare the contract with one's own configuration: a line for each key that differs, and who has not signed.

    Exit code 0 if it is the same, 1 if not.

    [bold]Example:[/bold] atoll contract check s3://bucket/run --config law.yaml
    """
    from pretrain.exchange.agreement import not_signed
    from pretrain.federation.contract import Agreed, describe_amendment

    agreed = Agreed.at(store, config, overrides or [])
    differences = agreed.differences(config, overrides or [])
    for difference in differences:
        print(f"differs     {difference}")
    if missing := not_signed(agreed.exchange):
        print(f"missing     the signature of {named(missing)} under the contract")
    for proposal in agreed.proposals():
        print(f"amended     {describe_amendment(agreed, proposal)}")
    print(f"{len(differences)} keys differ" if differences else "the contract says what this configuration says")
    raise typer.Exit(1 if differences else 0)


@app.command()
def sign(
    store: Store,
    config: Config,
    silo: Member,
    amendment: Annotated[int | None, typer.Option(help="Sign this amendment instead of the contract.")] = None,
    overrides: Overrides = None,
) -> None:
    """Show the contract and sign it, or an amendment of it, as a member. What differs from one's own is not signed.

    [bold]Example:[/bold] atoll contract sign s3://bucket/run --config law.yaml --silo law
    """
    from pretrain.federation.contract import Agreed
    from pretrain.federation.contract import sign as sign_it

    agreed = Agreed.at(store, config, overrides or [])
    agreed.as_member(config, overrides or [], silo)
    _print(agreed)
    missing = sign_it(agreed, silo, amendment)
    what = "the contract" if amendment is None else f"amendment {amendment}"
    print(f"signed      {what}, as {silo}; {_waits_for(missing)}")


@app.command()
def propose(config: Config, overrides: Overrides = None) -> None:
    """Write the contract into an empty store, so that members can read, check and sign it before anything runs.

    [bold]Example:[/bold] atoll contract propose --config federation.yaml
    """
    from pretrain.config.load import load_config
    from pretrain.federation.contract import Agreed
    from pretrain.federation.contract import propose as propose_it
    from pretrain.trust.members import with_keys

    loaded = with_keys(load_config(config, overrides or []), make=True)
    propose_it(loaded)
    _print(Agreed.at(loaded.store_url, config, overrides or []))


@app.command()
def gate(config: Config, overrides: Overrides = None) -> None:
    """Print what goes into `gate` of every member's configuration: the sha256 of the text of each held-out split here.

    [bold]Example:[/bold] atoll contract gate --config law.yaml
    """
    from pretrain.config.load import load_unchecked
    from pretrain.federation.preflight import gate_splits

    data, public = gate_splits(load_unchecked(config, overrides or []))
    print("gate:")
    for key, found in (("data", data), ("public", public)):
        if found:
            print("\n".join([f"  {key}:", *(f"    {name}: {digest}" for name, digest in found.items())]))


@app.command()
def amend(
    store: Store,
    config: Config,
    silo: Member,
    from_version: Annotated[int, typer.Option("--from", metavar="VERSION", help="From which version on it holds.")],
    changes: Annotated[list[str], typer.Argument(metavar="KEY=VALUE...", help="What it changes.")],
) -> None:
    """Propose an amendment, signed as a member: from a version on, terms are others, if all that are needed sign too.

    What changes model, data, codecs or schedule is another run.

    [bold]Example:[/bold] atoll contract amend s3://bucket/run -c law.yaml --silo law --from 40 membership.quorum=3
    """
    from pretrain.federation.contract import Agreed
    from pretrain.federation.contract import amend as amend_it

    agreed = Agreed.at(store, config)
    agreed.as_member(config, [], silo)
    say_proposed(agreed, amend_it(agreed, silo, from_version, changes))


def say_proposed(agreed: "Agreed", proposal: "Proposal") -> None:
    """What was proposed, and who has to do what."""
    from pretrain.federation.contract import describe_amendment

    number = proposal.amendment.number
    print(f"amendment {number}  {describe_amendment(agreed, proposal)}")
    if proposal.missing:
        print(f"Each of them: atoll contract sign {agreed.url} --config ... --silo ... --amendment {number}")


def _print(agreed: "Agreed") -> None:
    from pretrain.federation.contract import describe

    lines = list(describe(agreed))
    width = max(len(what) for what, _ in lines) + 2
    for what, text in lines:
        print(f"{what:<{width}}{text}")


def _waits_for(missing: list[str]) -> str:
    return f"the signature of {named(missing)} is missing" if missing else "all that are needed have signed"
