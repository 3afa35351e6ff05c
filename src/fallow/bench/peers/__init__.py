"""The peers: one adapter a file. ``docs/bench.md`` says how to add one."""

from __future__ import annotations

from fallow.bench.peers.base import Peer
from fallow.bench.peers.llama_cpp import LlamaCpp
from fallow.bench.peers.openvino import OpenVino
from fallow.bench.peers.transformers import Transformers
from fallow.bench.peers.vllm import Vllm
from fallow.errors import FallowError

# transformers first: the folder that it makes of a GGUF file serves the others too.
PEERS: dict[str, Peer] = {peer.name: peer for peer in (Transformers(), LlamaCpp(), OpenVino(), Vllm())}


def peer_named(name: str) -> Peer:
    """Raises ``FallowError`` where there is no such peer."""
    if name not in PEERS:
        raise FallowError(f"There is no peer named {name!r}: use one of {', '.join(sorted(PEERS))}.")
    return PEERS[name]
