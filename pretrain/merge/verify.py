"""A silo's delivery, compared with all that was agreed before any of it counts."""

import math
import threading
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from pretrain.config.keys import RunConfig
from pretrain.exchange.history import History
from pretrain.exchange.payload import Tensors, check_header, read_parameters
from pretrain.exchange.sealed import open_payload
from pretrain.exchange.store import StoreExchange, delivery_path
from pretrain.exchange.sums import Sums
from pretrain.merge.collect import Delivery
from pretrain.merge.terms import check_norm, check_payload_size, delivered_moments, read_delivery
from pretrain.outer.blocks import check_coded, squared_norms
from pretrain.outer.codec import check_layout, decoded
from pretrain.outer.digest import digest_rows, tensor_row
from pretrain.outer.moments import Moment, check_lengths, check_moments
from pretrain.outer.state import OuterState
from pretrain.outer.summed import SummedMoment
from pretrain.trust.ledger import RefusedError


class Verifier:
    """Reads the deliveries of one store."""

    def __init__(self, config: RunConfig, exchange: StoreExchange, inbox: Path, num_threads: int) -> None:
        """`inbox` is the folder into which payloads are downloaded."""
        self._config, self._exchange, self._schedule = config, exchange, config.schedule
        self._inbox, self._num_threads = inbox, num_threads
        self._history = History(exchange, config.outer.num_fragments)
        self._sums = Sums(config, exchange) if config.outer.secure_sum else None
        self._reading_base = threading.Lock()
        if config.trust.seal:  # what is opened there is nobody else's on this machine
            inbox.mkdir(mode=0o700, parents=True, exist_ok=True)
            inbox.chmod(0o700)
        self._last_base: tuple[int, dict[str, Tensor]] = -1, {}

    def verify(
        self,
        silo: str,
        data: bytes,
        state: OuterState,
        names: list[str],
        version: int,
        *,
        over: threading.Event | None = None,
    ) -> Delivery:
        """Check the manifest `data`, checksums, names, shapes, dtypes and values; raises RefusedError.

        `names` are the tensors of the version's fragment. Once `over` is set, no more of the payload is read, and
        StopWaitingError is raised.
        """
        exchange = self._exchange.until(over) if over else self._exchange
        late = None if version > state.version else self._late_base(version)
        rows = [tensor_row(name, late[name]) if late else state.rows[name] for name in names]
        manifest = read_delivery(
            data,
            silo=silo,
            version=version,
            base_digest=digest_rows(rows),
            config=self._config,
            contract_sha256=self._exchange.terms_sha256(version),
        )
        if self._sums:
            self._sums.shares(manifest)
        file = self._inbox / f"{silo}-{version:06d}.safetensors"
        shapes = {name: state.parameters[name].shape for name in names}
        agreed = delivered_moments(self._config, names, shapes)
        (payload,), is_sealed = manifest.payloads, self._exchange.is_sealed
        header_bytes = check_payload_size(payload, self._config.outer.codec, shapes, agreed, is_sealed=is_sealed)
        exchange.fetch(delivery_path(silo, version), payload, file)
        try:
            open_payload(self._exchange, silo, version, payload, file)
            check_header(file, limit_bytes=header_bytes)
            tensors = Tensors(file)
            delivery = Delivery(manifest=manifest, manifest_bytes=data, tensors=tensors, norm=0.0, base=late)
            delivery.norm = self._check_values(delivery, agreed, names, state)
        except SafetensorError as error:
            raise RefusedError(f"its payload is no safetensors file: {error}") from None
        except ValueError as error:
            raise RefusedError(str(error)) from None
        finally:
            file.unlink()  # what is open stays readable
        return delivery

    def _late_base(self, version: int) -> dict[str, Tensor]:
        """The fragment that a late delivery for `version` builds on, as it was then; the last one is remembered."""
        with self._reading_base:  # deliveries may be verified side by side
            if self._last_base[0] != (base := self._schedule.base(version)):
                made = self._history.parameters(base, self._schedule.fragment(version))
                self._last_base = base, read_parameters(self._exchange, made, self._inbox)
            return self._last_base[1]

    def _check_values(
        self, delivery: Delivery, agreed: Mapping[str, Moment | SummedMoment], names: list[str], state: OuterState
    ) -> float:
        """Check a payload's tensors; returns the norm of the pseudo-gradient in it. Raises ValueError."""
        if delivery.tensors.names != sorted(names):
            raise ValueError("it holds other tensors than those of its fragment")
        check_moments(delivery.tensors.moments, agreed)
        told = {name: moment for name, moment in agreed.items() if isinstance(moment, Moment)}
        check_lengths(delivery.tensors.moments, told, clip_norm=self._config.inner.clip_norm)
        codec, coded = self._config.outer.sent_codec, []
        check = check_layout if self._sums else check_coded
        for name in names:
            parts, base = delivery.tensors.parts(name), base_of(delivery, name, state)
            try:
                check(codec, parts, base.shape)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            coded.append((parts, base))
        if self._sums:
            return 0.0  # nobody knows
        check_norm(norm := math.fsum(squared_norms(codec, coded, self._num_threads)) ** 0.5)
        return norm


def base_of(delivery: Delivery, name: str, state: OuterState) -> Tensor:
    """What a tensor of a delivery was coded against."""
    return delivery.base[name] if delivery.base else state.parameters[name]


def pseudo_gradient(delivery: Delivery, name: str, state: OuterState, config: RunConfig) -> Tensor:
    """One tensor of a delivery, decoded, float64."""
    return decoded(config.outer.codec, base_of(delivery, name, state), delivery.tensors.parts(name))
