"""A silo's text as it is opened: what it trains on, and what it is judged by."""

from collections.abc import Callable
from functools import partial

from pretrain.config.allowed import DPO
from pretrain.config.keys import RunConfig
from pretrain.silo.data import Mixture, PackedTokens
from pretrain.silo.practised import Practised
from pretrain.silo.shards import template_sha256, tokenizer_sha256


def packed_opener(config: RunConfig) -> Callable[..., PackedTokens]:
    """`PackedTokens` as this run reads splits: what is left to say are directories, and the key that named them."""
    return partial(
        PackedTokens,
        sequence_tokens=config.sequence_tokens,
        tokenizer_sha256=tokenizer_sha256(config.tokenizer_file),
        template_sha256=template_sha256(config.template_file),
        prompt_tokens=config.model.adapter.prompt_tokens,
        keeps_apart=config.document_masking,
        of_pairs=config.inner.loss == DPO,
    )


def open_data(config: RunConfig, name: str) -> tuple[Mixture, dict[str, PackedTokens]]:
    """Training text and held-out text, by their manifests and sizes: no token is read, however large they are."""
    settings, opened = config.silos[name], packed_opener(config)

    def packed(directories: list[str], key: str) -> PackedTokens:
        return opened(directories, key=f"silos.{name}.{key}")

    # A stated seed gives the same order in every silo that states it; otherwise each silo has its own.
    seed, salt = (settings.data_seed, "") if settings.data_seed is not None else (0, name)
    corpora = [[directory] for directory in settings.data] if settings.data_weights else [settings.data]
    mixture = (Practised if settings.practice.is_on else Mixture)(
        [packed(corpus, "data") for corpus in corpora],
        weights=settings.data_weights or None,
        seed=seed,
        silo=salt,
        whole_batches_of=settings.global_batch_sequences if settings.is_private else 1,
    )
    return mixture, {corpus: packed([split], f"valid.{corpus}") for corpus, split in settings.valid.items()}
