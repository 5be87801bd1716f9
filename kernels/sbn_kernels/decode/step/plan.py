"""The plan of a decode step: what the kernel needs to know before it is compiled, and what it can do at all.

Everything here is plain Python on the host. A plan is frozen and holds only numbers, because Triton takes the plan as
one compile-time constant. A plan fixes

- the share of every program: tiles of 16 rows, dealt out evenly, the first programs taking the remainder;
- the map of shared memory;
- the units in which a program multiplies. ``schedule`` says when the weights of each unit are copied.

:func:`sbn_kernels.decode.step.planner.make_plan` makes a plan.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

WARPS = 8
TILE_ROWS = 16
STEP = 128  # columns
ROW_DATA = 128  # bytes behind a tile: for rows h and h + 8 two scales and two biases, h = 0 to 7
GROUP_HEADS = 8  # query heads of a group that share a key/value head: the rows of an instruction, half of 16
MERGE_SPLITS = 64  # most parts of a context
DIRECT = 512  # tokens up to which the parts of a context need no phase to be joined
MAX_BATCH = 16
COLUMNS = 8  # tokens that one instruction multiplies
SHARED_FROM = 7  # batches from this one on quantise each token once; measured at 1.5B, see Phase.shared
PARTLY_SHARED_FROM = 3  # the same for the result of attention and for the hidden vector only
ONE_PARTS = 4  # most parts of a context that the readers join for one token
SHARED_PARTS = 4  # most parts of a context that the program joins which quantises a token for all
CODES_PADDING = 1024  # bytes behind each vector's codes: warps without a step left read there
SHARED_BYTES = 232448  # the shared memory of a program on compute capability 9.0
STATISTICS, RESULTS = 2560, 3072  # offsets in attention's shared memory, see attention.py
HEAD_STEP = 256  # bfloat16 columns of the head that a warp has at a time, for three tokens and more
STAGING_STRIDE = 2 * HEAD_STEP + 64  # bytes between two rows of the head in shared memory, against bank conflicts
SMALL = 128  # bytes of maxima, sums and scales, see tokens.py
PHASES = ("qkv", "o", "gate_up", "down")
# Moments of a layer, in their order. The last row of a trace has the first three only: of the head.
STAMPS = (
    "start", "qkv: own tokens quantised", "qkv: all codes here", "qkv: multiplied", "attention: computed",
    "attention: joined", "o: own tokens quantised", "o: all codes here", "o: multiplied",
    "gate_up: own tokens quantised", "gate_up: all codes here", "gate_up: multiplied", "down: own tokens quantised",
    "down: all codes here", "down: multiplied",
)  # fmt: skip


@dataclass(frozen=True)
class Phase:
    """One matrix of a layer.

    Attributes:
        columns: The length of a row, K.
        all_tiles: The number of tiles of 16 rows in the matrix.
        tiles: The number of tiles in a *unit*, which is what a program multiplies at a time.
        groups: The number of groups of warps that split K; the warps of a group split the tiles.
        shared: Whether one program quantises the matrix's input of a token for all others, which read the codes from
            memory. Otherwise each program quantises every token itself. That saves a hand-over, but its work grows with
            the batch.
    """

    columns: int
    all_tiles: int
    tiles: int
    groups: int
    shared: bool = False

    @property
    def steps(self) -> int:
        """Steps of 128 columns."""
        return -(-self.columns // STEP)

    @property
    def tile_bytes(self) -> int:
        """Bytes of a tile with its scales and biases."""
        return self.steps * 512 + ROW_DATA


@dataclass(frozen=True)
class Shape:
    """The shape of a model, as far as a decode step needs to know.

    Attributes:
        layers: The number of blocks.
        d_model: The width of the residual stream.
        d_ffn: The width of the hidden layer of the SwiGLU.
        heads: The number of query heads.
        kv_heads: The number of key/value heads.
        head_size: The number of features of a head.
        vocab: The number of rows of the embedding and of the head.
        eps: The epsilon of RMSNorm.
    """

    layers: int
    d_model: int
    d_ffn: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int
    eps: float = 1e-6


@dataclass(frozen=True)
class Plan:
    """The compile-time constants of the kernel.

    Attributes:
        shape: The shape of the model.
        batch: The number of tokens a step, one for each sequence.
        batch_slots: ``batch`` rounded up to a power of two.
        programs: The number of programs of the grid, which all run at the same time.
        group: The number of query heads of a group; the heads of a group share a key/value head.
        splits: The largest number of parts of a context.
        qkv: The matrix of queries, keys and values.
        o: The matrix behind attention.
        gate_up: The first matrix of the MLP.
        down: The second matrix of the MLP.
        units: The largest number of units of a program in one step.
        barriers: The number of mbarriers in shared memory, a power of two.
        early_o: Whether the weights of o are copied before the product with q, k and v; later copies then wait for
            phase D.
        ring_bytes: The room for weights in shared memory, in bytes.
        pieces: The sizes of the shared-memory allocations, in words. Triton wants powers of two.
        digest: The digest of this package's sources, for Triton's cache.
        direct_parts: The largest number of parts of a context that the readers of attention's result join themselves.
            More parts need a phase of their own.
        shared_codes: Whether the codes of all matrices are shared (``Phase.shared``), and the final hidden states too.
            Otherwise those of ``o`` and ``down`` may be: both, because the codes of one make the emptying of the others
            visible, see ``shared.share_codes``.
        warps: The number of warps of a program.
        direct_tokens: The number of tokens up to which a context has at most ``direct_parts`` parts.
        traced: Whether each program writes down when it reaches each of :data:`STAMPS`.
        head_bits: Bits of a weight of the head: 16, or 8.
    """

    shape: Shape
    batch: int
    batch_slots: int
    programs: int
    group: int
    splits: int
    qkv: Phase
    o: Phase
    gate_up: Phase
    down: Phase
    units: int
    barriers: int
    early_o: bool
    ring_bytes: int
    pieces: tuple[int, int, int]
    digest: str
    direct_parts: int
    shared_codes: bool = False
    warps: int = WARPS
    direct_tokens: int = DIRECT
    traced: bool = False
    head_bits: int = 16

    @property
    def missing_only(self) -> bool:
        """Whether a poll reads again only what has not come; see ptx.py."""
        return self.batch == 1

    @property
    def token_plan(self) -> Plan:
        """The plan of one token, to which all warps of a program belong."""
        return replace(self, batch=1, batch_slots=1, shared_codes=False)

    @property
    def norm_plan(self) -> Plan:
        """The plan by which the threads of a program share the weights of a norm."""
        return self.token_plan if self.shared_codes else self

    @property
    def token_groups(self) -> int:
        """Groups of up to 8 tokens; an instruction multiplies the weights by one group."""
        return -(-self.batch_slots // COLUMNS)

    @property
    def sum_slots(self) -> int:
        """Places for tokens in a row of partial sums."""
        return 1 if self.batch == 1 else COLUMNS * self.token_groups

    @property
    def sum_pitch(self) -> int:
        """Words between two rows of partial sums; 4 more than a multiple of 8, against bank conflicts."""
        return 1 if self.batch == 1 else self.sum_slots + 4

    @property
    def at_positions(self) -> int:
        """Position of each token, int32 ``[batch]``."""
        return self.at_small + SMALL

    @property
    def at_statistics(self) -> int:
        """Sum of the codes and scale of each token, ``[batch slots, 2]`` of 32 bits, if codes are shared."""
        return self.at_positions + 4 * max(8, self.batch_slots)

    stamps = property(lambda self: len(STAMPS))
    layers = property(lambda self: self.shape.layers)
    d_model = property(lambda self: self.shape.d_model)
    d_ffn = property(lambda self: self.shape.d_ffn)
    heads = property(lambda self: self.shape.heads)
    kv_heads = property(lambda self: self.shape.kv_heads)
    head_size = property(lambda self: self.shape.head_size)
    eps = property(lambda self: self.shape.eps)
    d_attention = property(lambda self: self.shape.heads * self.shape.head_size)

    @property
    def qkv_heads(self) -> int:
        """Heads of a token's words: queries, keys, values."""
        return self.heads + 2 * self.kv_heads

    @property
    def groups(self) -> int:
        """Groups of query heads."""
        return self.heads // self.group

    @property
    def groups_per_kv_head(self) -> int:
        return self.groups // self.kv_heads

    @property
    def many_items(self) -> bool:
        """Whether a program may have several items of attention."""
        return self.batch * self.groups * max(self.splits, self.direct_parts) > self.programs

    @property
    def warps_per_token(self) -> int:
        return self.warps // self.batch_slots

    @property
    def result_words(self) -> int:
        """Words a row of attention's results takes; the padding spreads rows over the banks."""
        return self.head_size + 4

    def x_stride(self, columns: int) -> int:
        """Bytes between two tokens' codes: 16 more than a multiple of 128, against bank conflicts."""
        return -(-columns // STEP) * STEP + 16

    def sums_bytes(self, f: Phase) -> int:
        """Bytes of a tile's partial sums, int32 ``[groups, 16, sum_pitch]``; for one token ``[16, groups]``."""
        return 64 * f.groups * self.sum_pitch

    def codes_bytes(self, columns: int) -> int:
        """Bytes of all tokens' codes of a vector in memory."""
        return self.batch * -(-columns // STEP) * STEP + CODES_PADDING

    # Where the shared codes of each vector start, in bytes.

    at_codes_x = 0

    @property
    def at_codes_a(self) -> int:
        return self.at_codes_x + self.codes_bytes(self.d_model)

    @property
    def at_codes_y(self) -> int:
        return self.at_codes_a + self.codes_bytes(self.d_attention)

    @property
    def at_codes_h(self) -> int:
        return self.at_codes_y + self.codes_bytes(self.d_model)

    @property
    def at_final(self) -> int:
        """The final hidden states, bfloat16 ``[batch, head_columns]``, behind the codes."""
        return self.at_codes_h + self.codes_bytes(self.shape.d_ffn)

    @property
    def shared_bytes(self) -> int:
        """Bytes of everything that programs share as codes, of one layer. Two layers take turns."""
        return _align(self.at_final + 2 * self.batch * self.head_columns, 128)

    @property
    def head_columns(self) -> int:
        """d_model rounded up to a multiple of 128."""
        return -(-self.d_model // STEP) * STEP

    @property
    def head_stride(self) -> int:
        """Bytes between two tokens' final hidden states, bfloat16; 64 more than a multiple of 128."""
        return 2 * self.head_columns + 64

    # Map of shared memory, in bytes from its start.

    @property
    def at_schedule(self) -> int:
        return 8 * self.barriers

    @property
    def at_small(self) -> int:
        return self.at_schedule + 16 * (self.units + 1)

    @property
    def at_residual(self) -> int:
        """float32 ``[tiles of a program, 16, batch_slots]``."""
        return self.at_statistics + (8 * self.batch_slots if self.o.shared else 0)

    @property
    def at_rotation(self) -> int:
        """Cosine and sine, float32 ``[tiles of a program, 8, batch_slots, 2]``."""
        return self.at_residual + tiles_at_most(self.o.all_tiles, self.programs) * 64 * self.batch_slots

    @property
    def at_tokens(self) -> int:
        """int8 codes, unless they are shared; at the end the head's hidden states; also attention's shared memory."""
        tiles = tiles_at_most(self.qkv.all_tiles, self.programs)
        return _align(self.at_rotation + tiles * 64 * self.batch_slots, 128)

    @property
    def at_sums(self) -> int:
        """Partial sums of the products."""
        if self.shared_codes:
            return self.at_tokens
        widest = max(self.x_stride(f.columns) for f in self.phases if not f.shared)
        return _align(self.at_tokens + self.batch_slots * widest, 128)

    @property
    def at_ring(self) -> int:
        sums = max(f.tiles * self.sums_bytes(f) for f in self.phases)
        attention = RESULTS + 4 * self.result_words * self.warps * max(self.group, 2)
        head = self.batch_slots * self.head_stride
        return _align(max(self.at_sums + sums, self.at_tokens + max(attention, head)), 128)

    @property
    def at_staging(self) -> int:
        """Rows of the head, 16 for each warp, behind the hidden states; the ring is not in use any more."""
        return _align(self.at_tokens + self.batch_slots * self.head_stride, 128)

    @property
    def staging_end(self) -> int:
        """Where the room for the head ends."""
        return self.at_staging + (16 * STAGING_STRIDE * self.warps if self.batch > 2 else 0)

    @property
    def phases(self) -> tuple[Phase, Phase, Phase, Phase]:
        return self.qkv, self.o, self.gate_up, self.down

    @property
    def layer_bytes(self) -> int:
        """Bytes of a layer's packed weights."""
        return sum(f.all_tiles * f.tile_bytes for f in self.phases)


def share(tiles: int, programs: int, program: int) -> tuple[int, int]:
    """The first tile and the number of tiles of a program; ``rows.share`` computes the same on the device."""
    base, extra = divmod(tiles, programs)
    return program * base + min(program, extra), base + (program < extra)


def _align(n: int, to: int) -> int:
    return -(-n // to) * to


def tiles_at_most(tiles: int, programs: int) -> int:
    """The largest number of tiles of a program."""
    return -(-tiles // programs)


@functools.cache
def source_digest() -> str:
    """A digest of this package's sources.

    The digest is one of the kernel's constants, because Triton's cache does not hash the helpers that write PTX.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def refusal(shape: Shape, batch: int, activation_bits: int | None = 8) -> str | None:
    """Why the kernel cannot compute this model, in one line, or None. The device is not part of the question.

    Args:
        shape: The shape of the model.
        batch: The number of sequences.
        activation_bits: The activation bits of the model's ternary layers.
    """
    s = shape
    if activation_bits != 8:
        return f"needs activation_bits=8, not {activation_bits}"
    if not 1 <= batch <= MAX_BATCH:
        return f"takes 1 to {MAX_BATCH} sequences, not {batch}"
    if s.head_size not in (64, 128):
        return f"needs heads of 64 or 128 features, not {s.head_size}"
    if s.heads * s.head_size != s.d_model:
        return f"needs heads * head_size = d_model, not {s.heads} * {s.head_size} and {s.d_model}"
    if s.heads % s.kv_heads:
        return f"needs heads divisible by kv_heads, not {s.heads} and {s.kv_heads}"
    for name, value in (("d_model", s.d_model), ("d_ffn", s.d_ffn)):
        if value % 16:
            return f"needs {name} divisible by 16, not {value}"
        if value >= 131072:
            return f"needs {name} below 131,072 (32-bit sums), not {value}"
    return None
