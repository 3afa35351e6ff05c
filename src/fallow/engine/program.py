"""A decoder laid out as a native program: which operations run on which buffers, once for every step.

A new architecture is another function here. A plan's axis ``attention`` is part of the attention operation, ``ffn``
another feed-forward network, ``input`` a threshold where a linear's inputs are rounded, ``head`` another head, and
``structure`` lies in the shapes that the checkpoint brings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from fallow import _native
from fallow.arrays import Bytes, Float32
from fallow.models.config import ModelConfig
from fallow.models.dequantize import dequantize
from fallow.models.head_screen import HeadScreen, likely_tiles, row_blocks
from fallow.models.quantize import quantize_q4_1, quantize_q8_0
from fallow.models.resting import PageRule, Resting, ScreenRule
from fallow.models.rope import rope_table
from fallow.models.tensors import Checkpoint, RawTensor, TensorType

_GATES = {"silu": "silu_gate", "gelu_tanh": "gelu_gate", "relu": "relu_gate"}
"""Activations of a gate, and the epilogues of a linear that apply them."""
_FOUR_BITS = ("Q4_0", "Q4_1", "Q4_K")
TILE_ROWS = 16  # of a matrix are computed together


@dataclass
class ProgramBuilder:
    """Packs tensors into a native program and remembers what became of each, and of which linear layers the inputs may
    rest: ``inputs`` are layers, names and widths in the order of the program.

    ``precision``: ``auto`` keeps blocks as they are in the file and rounds floats to bf16; ``q8`` makes 8-bit groups of
    32, from the smallest to the largest value, of all but Q8_0; ``q4`` makes 4-bit groups of 32 (Q4_1) of floats, and
    8-bit ones (Q8_0) of the vocabulary's matrices; ``bf16`` rounds everything.
    """

    program: _native.Program
    checkpoint: Checkpoint
    precision: str
    rests: list[Resting]
    screen: ScreenRule | None = None
    head_screen: HeadScreen | None = None
    report: dict[str, str] = field(default_factory=dict)
    inputs: list[tuple[int, str, int]] = field(default_factory=list)

    def vector(self, name: str) -> int:
        tensor = self.checkpoint.tensors.get(name)
        if tensor is None:
            return -1
        return self.program.vector(np.ascontiguousarray(dequantize(tensor).reshape(-1), np.float32))

    def weights(
        self,
        names: list[str],
        *,
        interleave: bool = False,
        asymmetric: bool = False,
        vocabulary: bool = False,
        rounded: bool = False,
        layout: str = "tiles",
    ) -> int:
        """Packs the tensors one below the other. ``vocabulary``: embeddings or the head. ``rounded``: in 8-bit groups
        of 32, whatever they are. ``layout``: ``rows`` or ``columns`` where a step reads some of them."""
        tensors = [self.checkpoint.tensors[name] for name in names]
        (precision,) = {"q8" if rounded else self._kind(t, vocabulary)[1] for t in tensors}
        weights = self.program.weights(
            [self._source(t, vocabulary) for t in tensors],
            tensors[0].shape[1],
            interleave=interleave,
            asymmetric=asymmetric,
            precision=precision,
            layout=layout,
        )
        codes = self.program.describe(weights)
        for tensor in tensors:
            by = "" if layout == "tiles" else f", by {layout}"
            self.report[tensor.name] = f"{tensor.type.name} as {codes['codes']}{by}"
        return weights

    def neurons(self, up: str | None, down: str, *, gate: str | None = None) -> int:
        """Packs the up and the down projection neuron by neuron: in 8-bit groups of 32 what is quantised or is to be,
        else, and where 32 does not divide the columns, in bfloat16. ``gate``, where gates come rounded, goes along."""
        tensors = {name: self.checkpoint.tensors[name] for name in (up, down, gate) if name is not None}
        hidden, count = tensors[down].shape
        precision = "bf16" if self.keeps_floats(list(tensors)) or hidden % 32 else "q8"
        sources = {}
        for name, tensor in tensors.items():
            sources[name] = tensor.type.name, np.ascontiguousarray(tensor.read())
            self.report[name] = f"{tensor.type.name} as {'q8 and ' if name == gate else ''}{precision}, by neuron"
        return self.program.neuron_weights(
            sources[up] if up else None,
            sources[down],
            count,
            precision=precision,
            gate=sources[gate] if gate else None,
        )

    def keeps_4_bits(self, names: list[str]) -> bool:
        """Whether tensors are kept in 4 bits, so that they can lie by rows or by columns."""
        return all(self._kind(self.checkpoint.tensors[name], False)[0] in _FOUR_BITS for name in names)

    def keeps_floats(self, names: list[str]) -> bool:
        """Whether tensors are kept as bfloat16."""
        floating = all(self.checkpoint.tensors[name].type.is_floating for name in names)
        return self.precision == "bf16" or (self.precision == "auto" and floating)

    def signs(self, screen: HeadScreen) -> int:
        """Packs the screen's view of the head's rows."""
        head = self.checkpoint.head
        columns = screen.columns
        vocab, hidden = head.shape
        signs = _native.Signs(vocab, hidden, columns.directions, columns.sizes, first_columns=columns.first)
        first = 0
        for rows in row_blocks(head):
            codes = screen.codes(rows)
            deviations = np.ascontiguousarray(screen.deviations[:, first : first + len(rows)])
            signs.put_rows(first, codes.along, codes.positive, codes.scales, deviations)
            first += len(rows)
        self.report["head_screen"] = "signs"
        return self.program.signs(signs)

    def packs_together(self, names: list[str]) -> bool:
        """Whether tensors may share one packed matrix: stored alike, or all converted to the same."""
        return len({self._kind(self.checkpoint.tensors[name], False) for name in names}) == 1

    def _kind(self, tensor: RawTensor, vocabulary: bool) -> tuple[str, str]:
        """The storage type that is packed, the file's or blocks made of its floats, and the native precision for it."""
        if self.precision == "bf16":
            return "any", "bf16"
        if self.precision == "q8" and tensor.type is not TensorType.Q8_0:
            return "any", "q8"
        if self.precision == "q4" and tensor.type.is_floating:
            return ("Q8_0" if vocabulary else "Q4_1"), "own"
        return tensor.type.name, "own"

    def _source(self, tensor: RawTensor, vocabulary: bool) -> tuple[str, Bytes]:
        stored, _ = self._kind(tensor, vocabulary)
        if stored in ("any", tensor.type.name):
            return tensor.type.name, np.ascontiguousarray(tensor.read())
        quantise = quantize_q8_0 if stored == "Q8_0" else quantize_q4_1
        return stored, np.ascontiguousarray(quantise(dequantize(tensor)))


class DecoderProgram:
    """The Llama, Mistral, Qwen2, Qwen3 and Gemma 3 decoders and our own, which differ in a few optional operations
    only."""

    def __init__(self, builder: ProgramBuilder, positions: int) -> None:
        self._builder = builder
        self._program = builder.program
        self._config = builder.checkpoint.config
        config = self._config
        self._qkv = self._program.buffer(
            (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
        )
        self._make_buffers()
        self._tables = {
            local: self._program.vector(rope_table(rope, positions).reshape(-1))
            for local, rope in ((False, config.rope), (True, config.rope_local))
            if rope is not None
        }
        self._build()

    def _make_buffers(self) -> None:
        config, program = self._config, self._program
        self._x = program.buffer(config.hidden_size)
        self._branch = program.buffer(config.hidden_size) if config.post_norms else -1
        self._attended = program.buffer(config.num_attention_heads * config.head_dim)
        self._networks: dict[tuple[str, int], int] = {}
        self._kept: int | None = None
        self._activations: dict[tuple[object, ...], int] = {}

    def _build(self) -> None:
        config, program, builder = self._config, self._program, self._builder
        # The head's inputs have one-sided outliers: a midpoint a group costs little there and spares most of the error.
        table = builder.weights(["embed_tokens"], asymmetric=config.tie_word_embeddings, vocabulary=True)
        mixes = dequantize(builder.checkpoint.tensors["residual_mixes"]).tolist() if config.residual_mixes else []
        first = program.buffer(config.hidden_size) if mixes else self._x
        program.embed(table, first, config.embedding_scale)
        for layer in range(config.num_hidden_layers):
            if mixes:
                keep, again = mixes[layer]
                program.mix(self._x if layer else first, first, self._x, keep=keep, again=again)
            self._attention(layer)
            self._feed_forward(layer)
        self._head(table)

    def _head(self, table: int) -> None:
        config, program, builder = self._config, self._program, self._builder
        head = table if config.tie_word_embeddings else builder.weights(["lm_head"], asymmetric=True, vocabulary=True)
        logits = program.buffer(config.vocab_size)
        if builder.screen is not None and builder.head_screen is not None:
            self._screened_head(builder.screen, builder.head_screen, head, logits)
        else:
            activations = program.activations_for(head)
            program.norm_quantise(self._x, builder.vector("norm"), [activations], config.rms_norm_eps)
            program.linear(activations, head, logits)
            if config.logit_softcap is not None:
                program.soft_cap(logits, config.logit_softcap)
        program.finish(logits)

    def _screened_head(self, rule: ScreenRule, screen: HeadScreen, head: int, logits: int) -> None:
        """Approximate logits of all tokens, and exact ones of those that may be chosen."""
        config, program, builder = self._config, self._program, self._builder
        whole = program.activations_for(head)
        turn = program.weights([_floats(screen.projection)], config.hidden_size, precision="q8")
        turned = program.activations_for(turn)
        coordinates = program.buffer(config.hidden_size)
        program.norm_quantise(self._x, builder.vector("norm"), [whole, turned], config.rms_norm_eps)
        program.linear(turned, turn, coordinates)
        cap = config.logit_softcap or 0.0
        program.screen(coordinates, builder.signs(screen), logits, cap=cap)
        tiles = -(-rule.candidates // TILE_ROWS)
        program.look_again(logits, tiles=likely_tiles(-(-config.vocab_size // TILE_ROWS), tiles))
        program.shortlist(logits, tiles=tiles)
        program.rescore(whole, head, logits, cap=cap)

    def _attention(self, layer: int) -> None:
        config, program, builder = self._config, self._program, self._builder
        name = f"layers.{layer}."
        is_last = layer == config.num_hidden_layers - 1
        heads = builder.rests[layer].kept.kv_heads
        if heads == ():
            if is_last:
                self._keep_logit_rows()
            return
        parts = [name + part for part in ("q_proj", "k_proj", "v_proj")]
        rows = {part: builder.checkpoint.tensors[part].shape[0] for part in parts}
        groups = [parts] if builder.packs_together(parts) else [[part] for part in parts]
        matrices = [builder.weights(group) for group in groups]
        biases = [self._bias(group) for group in groups]
        inputs = self._normed(self._x, name + "attention_norm", matrices)
        kv_heads = None if heads is None else len(heads)
        column = 0
        for group, weights, activations, bias in zip(groups, matrices, inputs, biases, strict=True):
            program.linear(activations, weights, self._qkv, bias=bias, column=column)
            column += sum(rows[part] for part in group)
        if layer in config.value_embedding_layers:
            table = builder.weights([name + "value_embeddings"], vocabulary=True)
            program.embed(table, self._qkv, column=column - rows[parts[-1]], add=True)  # values are the last columns
        window = config.layer_windows[layer]
        local = window is not None and config.rope_local is not None
        rope = config.rope_local if local and config.rope_local is not None else config.rope
        program.rope(
            self._qkv,
            self._tables[local],
            rope.rotary_dim,
            q_norm=builder.vector(name + "q_norm"),
            k_norm=builder.vector(name + "k_norm"),
            eps=config.rms_norm_eps,
            layer=layer,
            kv_heads=kv_heads,
        )
        rule = builder.rests[layer].pages or PageRule(0, 0, ())
        program.attention(
            self._attended,
            layer=layer,
            kv_heads=kv_heads,
            window=window or 0,
            scale=config.attention_scale,
            sink_pages=rule.sink_pages,
            recent_pages=rule.recent_pages,
            top_pages=[rule.top_pages[head] for head in heads] if heads and rule.top_pages else rule.top_pages,
            context_pages=rule.context_pages,
        )
        if is_last:
            attended = self._attended
            self._keep_logit_rows()
            program.gather(attended, self._attended)
        self._project(self._attended, layer, "o_proj", name + "attention_post_norm")

    def _keep_logit_rows(self) -> None:
        """Go on with the rows whose logits are wanted: no layer will see the others any more."""
        x = self._x
        self._make_buffers()
        self._program.gather(x, self._x)

    def _feed_forward(self, layer: int) -> None:
        name = f"layers.{layer}."
        if self._builder.rests[layer].kept.neurons == ():
            return
        threshold = self._builder.rests[layer].neurons
        parts = [name + part for part in ("gate_proj", "up_proj", "down_proj")]
        inner = self._inner(name)
        lie_by_rows = self._config.gated_mlp and self._width(name) % TILE_ROWS == 0
        if threshold is not None and lie_by_rows and self._builder.keeps_4_bits(parts):
            self._rows_at_work(layer, threshold)
        elif threshold is not None:
            self._neurons_at_work(layer, threshold)
            return
        elif self._config.gated_mlp:
            self._gated(name)
        else:
            weights = self._builder.weights([name + "up_proj"])
            (activations,) = self._normed(self._x, name + "ffn_norm", [weights])
            bias = self._bias([name + "up_proj"])
            self._program.linear(activations, weights, inner, bias=bias, epilogue=self._config.hidden_act)
        self._project(inner, layer, "down_proj", name + "ffn_post_norm")

    def _width(self, name: str) -> int:
        """How many neurons a layer's feed-forward network has."""
        return self._builder.checkpoint.tensors[name + "up_proj"].shape[0]

    def _inner(self, name: str, what: str = "neurons") -> int:
        """A buffer for something of each neuron; networks of one width have it in common."""
        key = what, self._width(name)
        if key not in self._networks:
            self._networks[key] = self._program.buffer(key[1])
        return self._networks[key]

    def _gated(self, name: str) -> None:
        config, program, builder = self._config, self._program, self._builder
        parts = [name + "gate_proj", name + "up_proj"]
        plain = not config.mlp_bias and config.gate_quantile is None
        if plain and builder.packs_together(parts) and self._width(name) % TILE_ROWS == 0:
            weights = builder.weights(parts, interleave=True)
            (activations,) = self._normed(self._x, name + "ffn_norm", [weights])
            program.linear(activations, weights, self._inner(name), epilogue=_GATES[config.hidden_act])
        else:
            gate_up = self._inner(name, "gates"), self._inner(name, "ups")
            matrices = [builder.weights([part]) for part in parts]
            inputs = self._normed(self._x, name + "ffn_norm", matrices)
            for part, weights, activations, out in zip(parts, matrices, inputs, gate_up, strict=True):
                program.linear(activations, weights, out, bias=self._bias([part]))
            if config.gate_quantile is not None:
                program.above_threshold(gate_up[0], config.gate_quantile)
            program.gate(*gate_up, self._inner(name), activation=config.hidden_act)

    def _keep_largest(self, x: int, layer: int) -> None:
        """Of gates, or of the values of neurons without gates, where a plan says how many work at most."""
        most = self._builder.rests[layer].most_neurons
        if most is not None and most < self._width(f"layers.{layer}."):
            activation = self._config.hidden_act if self._config.gated_mlp else "relu"  # values of ReLU² stay
            self._program.keep_largest(x, most, activation=activation)

    def _rows_at_work(self, layer: int, threshold: float) -> None:
        """The gates of all neurons, then the rows of the up projection whose activated gates are beyond the threshold:
        what the dense network computes, with zeros for the others."""
        config, program, builder = self._config, self._program, self._builder
        name = f"layers.{layer}."
        gates = self._inner(name, "gates")
        gate, up = name + "gate_proj", name + "up_proj"
        matrices = [builder.weights([gate]), builder.weights([up], layout="rows")]
        inputs = self._normed(self._x, name + "ffn_norm", matrices)
        program.linear(inputs[0], matrices[0], gates, bias=self._bias([gate]))
        if config.gate_quantile is not None:
            program.above_threshold(gates, config.gate_quantile)
        self._keep_largest(gates, layer)
        program.linear(
            inputs[1],
            matrices[1],
            self._inner(name),
            bias=self._bias([up]),
            gates=gates,
            activation=config.hidden_act,
            threshold=threshold,
        )

    def _neurons_at_work(self, layer: int, threshold: float) -> None:
        """The gates of all neurons, or their values where they have no gate; then those beyond the threshold."""
        config, program, builder = self._config, self._program, self._builder
        name = f"layers.{layer}."
        resting_input = builder.rests[layer].inputs.get("down_proj", 0.0)
        gated, inner = config.gated_mlp, self._inner(name)
        gate, up = (name + "gate_proj", name + "up_proj") if gated else (None, None)
        rounds = self._rounds_gates and builder.rests[layer].most_neurons is None
        rounded = gate is not None and rounds and builder.keeps_floats([gate])
        weights = builder.weights([gate or name + "up_proj"], rounded=rounded)
        neurons = builder.neurons(up, name + "down_proj", gate=gate if rounded else None)
        activations = self._activation(weights)
        kept = self._kept_rows() if gated else -1
        program.norm_quantise(self._x, builder.vector(name + "ffn_norm"), [activations], config.rms_norm_eps, kept=kept)
        if not gated:
            program.linear(activations, weights, inner, epilogue=config.hidden_act)
            self._keep_largest(inner, layer)
            program.spread(inner, neurons, self._x, threshold=max(threshold, resting_input))
            return
        program.linear(activations, weights, inner)
        if config.gate_quantile is not None:
            program.above_threshold(inner, config.gate_quantile)
        self._keep_largest(inner, layer)
        program.neurons(kept, inner, neurons, activation=config.hidden_act, threshold=threshold)
        program.spread(inner, neurons, self._x, threshold=resting_input)

    @property
    def _rounds_gates(self) -> bool:
        """Few bits tell of most gates of ReLU that they are zero."""
        config = self._config
        return config.hidden_act == "relu" and config.gate_quantile is None and config.hidden_size % 32 == 0

    def _kept_rows(self) -> int:
        """A buffer for what is normalised and not rounded."""
        if self._kept is None:
            self._kept = self._program.buffer(self._config.hidden_size)
        return self._kept

    def _project(self, x: int, layer: int, part: str, post_norm: str) -> None:
        """Back to the residual stream, through a norm where the family has one after the block. Where inputs rest, or
        neurons do, the columns of those that are not zero are read."""
        config, program, builder = self._config, self._program, self._builder
        name, rests = f"layers.{layer}.{part}", builder.rests[layer]
        threshold = rests.inputs.get(part, 0.0 if part == "down_proj" and rests.neurons is not None else None)
        by_columns = threshold is not None and builder.keeps_4_bits([name])
        weights = builder.weights([name], layout="columns" if by_columns else "tiles")
        activations = self._activation(weights)
        if part in rests.inputs:
            attended = config.num_attention_heads * config.head_dim
            builder.inputs.append((layer, part, attended if part == "o_proj" else config.intermediate_size))
        program.quantise(x, activations, threshold=threshold or 0.0, recorded=part in rests.inputs)
        if not config.post_norms:
            program.linear(activations, weights, self._x, bias=self._bias([name]), epilogue="add")
            return
        program.linear(activations, weights, self._branch, bias=self._bias([name]))
        program.norm(self._branch, builder.vector(post_norm), self._branch, config.rms_norm_eps)
        program.add(self._branch, self._x)

    def _normed(self, x: int, norm: str, matrices: list[int]) -> list[int]:
        """The normalised ``x`` in the form that each matrix reads."""
        activations = [self._activation(weights) for weights in matrices]
        distinct = list(dict.fromkeys(activations))
        self._program.norm_quantise(x, self._builder.vector(norm), distinct, self._config.rms_norm_eps)
        return activations

    def _activation(self, weights: int) -> int:
        """One buffer of activations for all matrices that read them in the same form."""
        form = self._program.describe(weights)
        key = (form["in_features"], form["codes"] == "bf16", form["group"], form["pairs"])
        if key not in self._activations:
            self._activations[key] = self._program.activations_for(weights)
        return self._activations[key]

    def _bias(self, names: list[str]) -> int:
        tensors = [self._builder.checkpoint.tensors.get(f"{name}.bias") for name in names]
        if all(tensor is None for tensor in tensors):
            return -1
        rows = [self._builder.checkpoint.tensors[name].shape[0] for name in names]
        values = [
            np.zeros(n, np.float32) if tensor is None else dequantize(tensor).reshape(-1)
            for tensor, n in zip(tensors, rows, strict=True)
        ]
        return self._program.vector(np.concatenate(values).astype(np.float32))


def _floats(values: Float32) -> tuple[str, Bytes]:
    """A matrix as a source of weights."""
    return "F32", np.ascontiguousarray(values, np.float32).view(np.uint8)


Layout = Callable[[ProgramBuilder, int], object]
LAYOUTS: dict[str, Layout] = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma3", "fallow"), DecoderProgram)


def layout_of(config: ModelConfig) -> Layout:
    return LAYOUTS[config.architecture]
