"""A causal language model of `transformers`, from a configuration or from a local checkpoint directory."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from pretrain.config.adapter import PROMPT
from pretrain.config.errors import ConfigError
from pretrain.config.keys import ModelConfig, RunConfig
from pretrain.host.foreign import shown
from pretrain.silo.adapter import add_adapter, initial_factors
from pretrain.silo.architecture import model_config, one_line
from pretrain.silo.attention import DOCUMENTS, check_type, document_lengths
from pretrain.silo.batch import BY_TOKENS, IGNORED
from pretrain.silo.prompt import add_prompt, first_tokens, initial_prompt
from pretrain.silo.vocabulary import read_tokenizer, vocabulary_size
from pretrain.silo.weights import checkpoint_files, tensors_of

# What masking may leave of the influence of the document before: 0, or a few roundings where experts take turns. Of the
# types that do not mask, every one left a tenth or more.
MASKING_TOLERANCE = 0.05
# What a later token may change, of what an earlier one does: 0, or a few roundings. In an encoder it is as much.
CAUSALITY_TOLERANCE = 0.2
READ_ONE_BY_ONE = "HF_DEACTIVATE_ASYNC_LOAD"  # transformers' threads else read ahead of what is placed, up to all
# How torch says that shapes do not fit each other.
SHAPES = re.compile(r"shape|size|dimension|cannot be multiplied|number of heads", re.IGNORECASE)


def build_initial(settings: ModelConfig, vocab_size: int) -> nn.Module:
    """The model of version 0 in fp32 on the CPU: fresh weights from the contract's seed, or the checkpoint's.

    Raises ConfigError for a configuration of which there is no model, or a checkpoint that does not fill it.
    """
    config = model_config(settings, vocab_size)
    if settings.checkpoint:
        return load_checkpoint(Path(settings.checkpoint))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        try:
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except Exception as error:  # each type of model raises what it likes
            raise ConfigError(f"model.config: {one_line(error)}") from None


def load_checkpoint(directory: Path, *, key: str = "model.checkpoint") -> PreTrainedModel:
    """The fp32 model of a `transformers` directory.

    Raises ConfigError, naming `key`, for files that are not whole, and unless every tensor of the model is in them and
    they hold no other.
    """
    checkpoint_files(directory, key=key)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what it reports over many lines follows here in one
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # each type of model raises what it likes
        raise ConfigError(f"{key}: {str(directory)!r} given; {one_line(error)}") from None
    finally:
        logging.set_verbosity(verbosity)
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    other = sorted(name for name, *_ in info["mismatched_keys"])
    if missing or unexpected or other:
        names = [*other, *missing[:2], *unexpected[:1], *missing[2:], *unexpected[1:]]
        raise ConfigError(
            f"{key}: {str(directory)!r} given; {len(missing)} of its model's tensors are missing, "
            f"{len(unexpected)} are unexpected and {len(other)} have another shape: "
            f"{', '.join(shown(name) for name in names[:3])}{', ...' if len(names) > 3 else ''}; allowed: a directory "
            "whose weights fill the model of its config.json"
        )
    return model


def initial_parameters(config: RunConfig, place: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """What version 0 holds: the trained parameters of `build_initial`, or of an adapter, by name.

    `place`, if given, makes a copy of each fp32 tensor where it shall lie, one after another: the model is never in
    memory as a whole. Raises ConfigError, too, for a model that sees the future, or that is more than its parameters
    say to others.
    """
    vocab_size = vocabulary_size(config.tokenizer_file)
    if config.model.adapter.kind == PROMPT:
        return {name: (place or torch.clone)(value) for name, value in _initial_prompt(config, vocab_size).items()}
    if config.model.adapter.is_on:  # each party has the rest
        return initial_factors(build_without_memory(config.model, vocab_size), config.model.seed, place or torch.clone)
    with _placed_by(place) if place else nullcontext():
        model = build_initial(config.model, vocab_size)
    _check_buffers(model, config.model, vocab_size)
    was_training = model.training
    check_causality(model.eval(), torch.device("cpu"))
    return trained_parameters(model.train(was_training))


def _initial_prompt(config: RunConfig, vocab_size: int) -> dict[str, Tensor]:
    assert config.model.checkpoint
    checkpoint = Path(config.model.checkpoint)
    with parameters_on_meta():
        model = build_empty(config.model, vocab_size, dtype=torch.float32)

    def whole() -> Tensor:
        embedding: Any = load_checkpoint(checkpoint).get_input_embeddings()
        return embedding.weight

    tokens = first_tokens(read_tokenizer(config.tokenizer_file), config.model.adapter)
    return initial_prompt(model, tokens, checkpoint, whole)


def trained_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Those that travel, by name, without gradients; in the model's own memory."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def _check_buffers(model: nn.Module, settings: ModelConfig, vocab_size: int) -> None:
    """Refuse a model with buffers that are neither computed from its configuration nor in its checkpoint.

    Only parameters travel: silos and export would have others.
    """
    with parameters_on_meta():
        others = dict(build_empty(settings, vocab_size, dtype=torch.float32).named_buffers())
    lost = [name for name, value in model.named_buffers() if not torch.equal(value, others[name])]
    if lost:
        raise ConfigError(
            f"model: {len(lost)} buffers of {model.config.model_type} do not follow from its configuration: "  # type: ignore[union-attr]
            f"{', '.join(lost[:3])}; allowed: a model that its parameters describe"
        )


def build_empty(
    settings: ModelConfig,
    vocab_size: int,
    *,
    dtype: torch.dtype,
    partitioned: AbstractContextManager[Any] | None = None,
    attention: str = "",
) -> nn.Module:
    """The model's structure with parameters that are about to be overwritten; `partitioned` is ZeRO-3's context.

    With an adapter, its parameters are the trained ones, and the rest is frozen (base.py fills it). `attention` is an
    implementation of `transformers`, or attention.py's. Raises ConfigError for one that is not here.
    """
    config = model_config(settings, vocab_size)
    config.use_cache = False
    options = {"attn_implementation": attention} if attention else {}
    try:
        with partitioned or nullcontext(), no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    except (ImportError, ValueError) as error:
        if not attention:
            raise
        raise ConfigError(f"silo.attention: {attention!r} given; {one_line(error)}") from None
    model.tie_weights()  # part of the initialization that was skipped
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # packed text has no padding: whatever is looked up is trained
    if settings.checkpoint:
        _read_buffers(model, Path(settings.checkpoint))
    if settings.adapter.is_on:  # after zero.Init has ended; DeepSpeed shares what is added out by itself
        (add_prompt if settings.adapter.kind == PROMPT else add_adapter)(model, settings.adapter)
    return model


def _read_buffers(model: nn.Module, directory: Path) -> None:
    """Fill the buffers that a checkpoint holds: no parameters, but what its training may have left there.

    They need not travel, as all parties have the checkpoint. Raises ConfigError if one is not there.
    """
    saved = model.state_dict().keys()
    buffers = {name: value for name, value in model.named_buffers() if name in saved and not value.is_meta}
    if not buffers:
        return
    for file in checkpoint_files(directory):
        if file.suffix == ".safetensors" and (names := buffers.keys() & tensors_of(file)):
            with safe_open(file, framework="pt") as tensors:
                for name in names:
                    buffers.pop(name).copy_(tensors.get_tensor(name))
    if buffers:
        raise ConfigError(
            f"model.checkpoint: {str(directory)!r} given; {len(buffers)} buffers of its model are not there: "
            f"{', '.join(sorted(buffers)[:3])}; allowed: a directory that holds them under these names"
        )


def build_without_memory(settings: ModelConfig, vocab_size: int) -> nn.Module:
    """The model's structure, which takes no memory. Raises ConfigError for a configuration of which there is none."""
    try:
        with torch.device("meta"):
            return build_empty(settings, vocab_size, dtype=torch.float32)
    except ConfigError:
        raise
    except Exception as error:  # each type of model raises what it likes
        raise ConfigError(f"{_key(settings)}: {one_line(error)}") from None


def check_shapes(settings: ModelConfig, vocab_size: int, sequence_tokens: int) -> None:
    """Run a sequence through the model without memory; raises ConfigError where sizes do not fit each other.

    Some types of model, with experts for instance, run only part of the way without memory. The first pass of the
    engine, `check_causality`, is the whole way.
    """
    model = build_without_memory(settings, vocab_size)
    config: Any = model.config
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < sequence_tokens:
        name = config.attribute_map.get("max_position_embeddings", "max_position_embeddings")
        raise ConfigError(
            f"{_key(settings)}.{name}: {positions} given; allowed: {sequence_tokens} (sequence_tokens) or more"
        )
    rows = torch.zeros((1, sequence_tokens), dtype=torch.long, device="meta")
    try:
        with torch.no_grad(), _fitting_sizes():
            model.eval()(input_ids=rows, use_cache=True)  # without a cache, masks are made from values
    except ConfigError:
        raise
    except Exception as error:
        logging.get_logger(__name__).debug("no pass without memory: %s", error)


@contextmanager
def _fitting_sizes() -> Iterator[None]:
    """Turns what torch says of shapes that do not fit each other into a ConfigError."""
    try:
        yield
    except RuntimeError as error:
        if "meta" in str(error) or not SHAPES.search(str(error)):
            raise
        raise ConfigError(
            f"model: its sizes (numbers of heads, widths, experts) do not fit each other: {one_line(error)}"
        ) from None


def _key(settings: ModelConfig) -> str:
    return "model.checkpoint: config.json" if settings.checkpoint else "model.config"


@contextmanager
def _parameters_as(made_of: Callable[[nn.Parameter], nn.Parameter]) -> Iterator[None]:
    """Modules built inside hold what is made of their parameters, one after another."""
    register = nn.Module.register_parameter

    def register_made(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, None if parameter is None else made_of(parameter))

    nn.Module.register_parameter = register_made  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def parameters_on_meta() -> AbstractContextManager[None]:
    """Modules built inside hold real buffers, but parameters without memory."""
    return _parameters_as(lambda parameter: nn.Parameter(parameter.to("meta")))


@contextmanager
def _placed_by(place: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Parameters of models built or loaded inside lie where `place` puts them, from before they are initialised on."""
    placed: set[int] = set()

    def of(parameter: nn.Parameter) -> nn.Parameter:
        if parameter.is_meta or parameter.dtype != torch.float32 or parameter.data_ptr() in placed:
            return parameter  # not one yet; or tied, or set again
        made = nn.Parameter(place(parameter.detach()), requires_grad=parameter.requires_grad)
        vars(made).update(vars(parameter))  # transformers notes there what is initialised
        placed.add(made.data_ptr())
        return made

    before = os.environ.get(READ_ONE_BY_ONE)
    os.environ[READ_ONE_BY_ONE] = "1"
    try:
        with _parameters_as(of):
            yield
    finally:
        os.environ.pop(READ_ONE_BY_ONE)
        if before is not None:
            os.environ[READ_ONE_BY_ONE] = before


def restore_buffers(model: nn.Module, settings: ModelConfig, vocab_size: int) -> None:
    """Give `model` the buffers of a plain model: ZeRO-3's context rounds them (rotary frequencies!) to bf16."""
    buffers = dict(model.named_buffers())
    with parameters_on_meta():
        plain = build_empty(settings, vocab_size, dtype=torch.float32)
    for name, value in plain.named_buffers():
        buffers[name].data = value.to(buffers[name].device)


def document_positions(input_ids: Tensor, end_of_text_id: int) -> Tensor:
    """Each token's position in its document, which begins at an end-of-text token. # (num_sequences, sequence_tokens)

    What a sequence begins with, the rest of a document, counts from 0 too.
    """
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    begins = torch.where(input_ids == end_of_text_id, positions, 0).cummax(dim=1).values
    return positions - begins


def token_losses(
    model: nn.Module,
    input_ids: Tensor,
    targets: Tensor,
    mask_at: int | None = None,
    *,
    positions: Tensor | None = None,
    chunk_tokens: int = 0,
    cross_entropy: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Cross-entropy in nats of every target, 0 of IGNORED ones. All and result: (num_sequences, sequence_tokens).

    `mask_at` is the end-of-text token at which another document begins that sees nothing of those before it (None:
    all is one text). So a document's loss in a packed sequence is its loss alone after an end-of-text token.
    `positions` say of conversations where they begin, as of `Batch`.
    With `chunk_tokens` there are never logits of more tokens at once: those of one chunk after another are made for the
    forward pass, and once more for the backward pass. `cross_entropy`: `target_losses`, or what it was compiled to.
    """
    losses_of = cross_entropy or target_losses
    if not chunk_tokens:
        logits = _logits(model, input_ids, mask_at, positions)
        return losses_of(logits.flatten(0, 1), targets.flatten()).view_as(targets)
    module: Any = getattr(model, "module", model)
    head, found = module.get_output_embeddings(), list[Tensor]()
    hook = module.base_model.register_forward_hook(lambda _module, _inputs, output: found.append(output[0]))
    try:
        _logits(model, input_ids, mask_at, positions, logits_to_keep=1)
    finally:
        hook.remove()
    chunks = zip(found[0].flatten(0, 1).split(chunk_tokens), targets.flatten().split(chunk_tokens), strict=True)
    # Of a frozen head ZeRO-3 has let go again when torch would compare the shape of what was kept with what is.
    options: dict[str, Any] = {"use_reentrant": False, "determinism_check": "none"}
    losses = [checkpoint(lambda hidden, target: losses_of(head(hidden), target), *chunk, **options) for chunk in chunks]
    return torch.cat(losses).view_as(targets)


def target_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats of every target. logits: (num_tokens, vocab_size); targets and result: (num_tokens,)."""
    return F.cross_entropy(logits.float(), targets, reduction="none", ignore_index=IGNORED)


def _logits(
    model: nn.Module, input_ids: Tensor, mask_at: int | None, positions: Tensor | None = None, **options: Any
) -> Tensor:
    assert positions is None or mask_at is not None, "conversations of one row would see each other"
    if mask_at is not None:
        # From positions that restart, no mask and no cache `transformers` makes the mask that keeps documents apart.
        found = document_positions(input_ids, mask_at)
        options["position_ids"] = found if positions is None else torch.where(positions == BY_TOKENS, found, positions)
        if _attention(model) == DOCUMENTS:
            options["documents"] = document_lengths(options["position_ids"])
    return model(input_ids=input_ids, use_cache=False, **options).logits


def _attention(model: nn.Module) -> str:
    module: Any = getattr(model, "module", model)
    return module.config._attn_implementation


def compile_layers(model: nn.Module) -> None:
    """Have every layer compiled when it runs first; layers that are alike share what the compiler keeps on disk."""
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(dynamic=False)


@torch.no_grad()
def go_by_documents(model: nn.Module, end_of_text_id: int, device: torch.device) -> str:
    """Have attention compute each document by itself; "" if that comes to what a mask does, else why it does not.

    Two short forward passes; a model that asks for more stays as it was. `model` holds its parameters and has dropout
    off.
    """
    module: Any = getattr(model, "module", model)
    a, b, c, d, e = ((end_of_text_id + offset) % 6 for offset in range(1, 6))
    rows = torch.tensor([[a, b, c, end_of_text_id, d, e], [end_of_text_id, e, c, b, d, end_of_text_id]], device=device)
    before, verbosity, why = _attention(model), logging.get_verbosity(), ""
    logging.set_verbosity_error()
    try:
        check_type(module.config)
        masked = _logits(model, rows, end_of_text_id).float()
        module.set_attn_implementation(DOCUMENTS)
        alone = _logits(model, rows, end_of_text_id).float()
        if _attention(model) != DOCUMENTS or not torch.allclose(
            alone, masked, rtol=1e-2, atol=0.01 * masked.std().item()
        ):
            why = "its attention is another"
    except Exception as error:  # each type of model raises what it likes
        why = one_line(error)
    finally:
        logging.set_verbosity(verbosity)
        if why:
            module.set_attn_implementation(before)
    return why


@torch.no_grad()
def check_chunks(model: nn.Module, chunk_tokens: int, device: torch.device) -> None:
    """Raise ConfigError unless losses of chunks are those of whole logits.

    They are not where a model makes more of its logits than its head does (caps, scales). `model` holds its parameters
    and has dropout off.
    """
    rows = torch.arange(6, device=device).repeat(2, 1)
    whole = token_losses(model, rows, rows)
    try:
        same = torch.allclose(token_losses(model, rows, rows, chunk_tokens=min(chunk_tokens, 5)), whole, rtol=1e-3)
    except Exception as error:  # each type of model raises what it likes
        logging.get_logger(__name__).debug("no loss in chunks: %s", error)
        same = False
    if not same:
        raise ConfigError(
            f"silo.loss_chunk_tokens: {chunk_tokens} given; this type of model makes more of its logits than its last "
            "layer does; allowed: 0"
        )


@torch.no_grad()
def check_causality(model: nn.Module, device: torch.device) -> None:
    """Raise ConfigError unless a later token leaves the logits of those before it as they are.

    One short forward pass. A model that sees what it shall predict learns nothing, at a loss that falls towards 0.
    `model` holds its parameters and has dropout off.
    """
    rows = torch.arange(6, device=device).repeat(3, 1)
    rows[1, 0], rows[2, -1] = 3, 3
    with _fitting_sizes():
        plain, first, last = _logits(model, rows, None).float()
    forwards, backwards = (plain - first)[1:].abs().max().item(), (plain - last)[:-1].abs().max().item()
    if backwards > CAUSALITY_TOLERANCE * forwards:
        raise ConfigError(
            "model: one given that sees the tokens which it shall predict (a later token changes what it says before); "
            "allowed: a causal decoder, as bert and its like are with model.config.is_decoder=true"
        )


@torch.no_grad()
def check_document_masking(model: nn.Module, end_of_text_id: int, device: torch.device) -> None:
    """Raise ConfigError unless masking keeps a document's logits from depending on the document before it.

    Two short forward passes, so that it sees what this type of model makes of positions, layer by layer. `model` holds
    its parameters and has dropout off.
    """
    a, b, c, d, e = ((end_of_text_id + offset) % 6 for offset in range(1, 6))
    rows = torch.tensor([[a, b, c, end_of_text_id, d, e], [e, d, a, end_of_text_id, d, e]], device=device)

    def influence(mask_at: int | None) -> float:
        one, other = _logits(model, rows, mask_at)[:, 3:].float()
        return (one - other).abs().max().item()

    if not influence(end_of_text_id) <= MASKING_TOLERANCE * influence(None):
        raise ConfigError(
            "document_masking: true given; this type of model lets a document see the one before it even so; allowed: "
            "false, or a model whose attention follows position_ids (llama, mistral, qwen3, gpt2, gpt_neox, ...)"
        )
