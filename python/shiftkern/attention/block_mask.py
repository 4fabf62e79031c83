"""Which pairs of queries and keys attention keeps, block by block."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NoReturn, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shiftkern import _checks

__all__ = ["BlockMask"]

_Ints: TypeAlias = NDArray[np.int64]
_Bytes: TypeAlias = NDArray[np.uint8]
_Bools: TypeAlias = NDArray[np.bool_]
_Shape: TypeAlias = tuple[int, int, int, int]
_Block: TypeAlias = tuple[int, int]

_SIDE = 1024  # longest side of a block
_TOKENS = (1 << 31) - 1  # positions and their products stay far inside int64
_CELLS = 1 << 22  # pairs that are looked at in one go
_PICTURE = 1000  # blocks along the longer side of a plot, above which several share a cell
_STATE = ("shape", "block", "indptr", "indices", "inner", "patterns")
_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.uint8)


class BlockMask:
    """Pairs of queries and keys that attention keeps, as a list of blocks for each row of blocks.

    A block is absent (nothing kept), full, or refers to one of the mask's distinct bit patterns. Equal masks have equal
    arrays however they were built, so they compare equal and share a digest. Made by the constructors below; the
    class itself takes the arrays of another mask, which are checked.

    Parameters
    ----------
    shape : tuple of int
        ``(maps_b, maps_h, n_q, n_k)``; a 1 for ``maps_b`` or ``maps_h`` serves every batch or head.
    block : tuple of int
        ``(block_q, block_k)``, each from 1 to 1024.
    indptr, indices, inner, patterns : Tensor or numpy.ndarray
        As the attributes below.

    Attributes
    ----------
    shape, block : tuple of int
        As given.
    indptr : Tensor
        int64 ``(maps_b, maps_h, ceil(n_q / block_q) + 1)``: where the blocks of each row lie in ``indices``, map after
        map.
    indices : Tensor
        int64 ``(nnz,)``: columns of the kept blocks, increasing within a row.
    inner : Tensor
        int64 ``(nnz,)``: -1 where every pair of the block is kept, else a row of ``patterns``.
    patterns : Tensor
        uint8 ``(P, block_q, 4 * ceil(block_k / 32))``: bit ``j`` (little end first) of row ``i`` is set where query
        ``i`` of the block keeps its key ``j``. Pairs beyond ``n_q`` or ``n_k`` are 0; a block at the edge all of whose
        existing pairs are kept is full.
    digest : str
        32 hexadecimal digits that are the same for equal masks, on every machine.

    Raises
    ------
    ArgumentError
        Arrays that are no mask: out of range, decreasing, of wrong lengths, or with a column twice in a row.
    ArgumentTypeError
        Arrays or numbers of a wrong type.

    Notes
    -----
    A mask is not to be changed: its attributes cannot be replaced, and writing into its tensors makes the digest wrong.
    Memory is 16 bytes for each kept block and an eighth of a byte for each pair of each distinct pattern. Masks pickle
    and copy; :meth:`state_dict` holds tensors and integers only, so that ``torch.load(weights_only=True)`` reads it.

    Examples
    --------
    >>> from shiftkern.attention import BlockMask
    >>> mask = BlockMask.sliding_window(1024, 1024, 64, 64)
    >>> mask
    BlockMask(shape=(1, 1, 1024, 1024), block=(64, 64), density=0.122)
    >>> mask == BlockMask.from_bool(mask.to_dense())
    True
    >>> int(mask.to_dense().sum()) == mask.n_kept_pairs
    True
    """

    shape: _Shape
    block: _Block
    indptr: Tensor
    indices: Tensor
    inner: Tensor
    patterns: Tensor
    digest: str

    def __init__(self, shape: Any, block: Any, indptr: Any, indices: Any, inner: Any, patterns: Any) -> None:
        op = "BlockMask"
        if not isinstance(shape, (tuple, list)) or len(shape) != 4:
            _checks.refuse_type(op, "shape", "(maps_b, maps_h, n_q, n_k)", _checks.describe(shape))
        maps_b, maps_h = (_checks.positive_int(op, "shape", size) for size in shape[:2])
        whole = (maps_b, maps_h, *_tokens(op, shape[2:]))
        block = check_block(op, block)
        rows, cols = _grid(whole, block)
        starts = _whole_numbers(op, "indptr", indptr)
        if starts.shape != (maps_b, maps_h, rows + 1):
            _checks.refuse(op, "indptr", f"shape {(maps_b, maps_h, rows + 1)}", f"shape {starts.shape}")
        row, col, order = _listed_blocks(op, starts, _whole_numbers(op, "indices", indices), cols)
        code = _whole_numbers(op, "inner", inner)
        if code.shape != col.shape:
            _checks.refuse(op, "inner", f"shape {col.shape}, as indices", f"shape {code.shape}")
        table = patterns
        if isinstance(patterns, Tensor):
            table = _checks.tensor(op, "patterns", patterns, dtypes=(torch.uint8,)).cpu().numpy()
        if not isinstance(table, np.ndarray) or table.dtype != np.uint8:
            _checks.refuse_type(op, "patterns", "a tensor or array of dtype uint8", _checks.describe(patterns))
        width = _stored_bytes(block)
        if table.ndim != 3 or table.shape[1:] != (block[0], width):
            _checks.refuse(op, "patterns", f"shape (P, {block[0]}, {width})", f"shape {table.shape}")
        if code.size and (code.min() < -1 or code.max() >= len(table)):
            _checks.refuse(op, "inner", f"numbers from -1 to {len(table) - 1}", f"{code.min()} to {code.max()}")
        self._fill(whole, block, row, col, code[order], table[:, :, : -(-block[1] // 8)])

    def _fill(self, shape: _Shape, block: _Block, row: _Ints, col: _Ints, code: _Ints, table: _Bytes) -> None:
        """Bring kept blocks into the one form that a mask has.

        Blocks are sorted by ``row`` (counted over all maps) and ``col``. ``code`` is -1 for a block that is kept as
        a whole, else a row of ``table``, ``(P, block_q, ceil(block_k / 8))`` packed bits, which may repeat, be empty
        or full, and have bits beyond the mask's edge.
        """
        rows, cols = _grid(shape, block)
        maps = shape[0] * shape[1]
        # What a pattern is depends on the edges that cut its block: right (1), bottom (2), both or none.
        exists = np.stack([_corner(block, *size) for size in _edge_sizes(shape, block)])
        key = 4 * (code + 1) + (col == cols - 1) + 2 * (row % max(rows, 1) == rows - 1)
        seen = np.zeros(4 * (len(table) + 1), dtype=np.bool_)
        seen[key] = True
        used = np.flatnonzero(seen)
        bits = exists[used % 4]
        listed = used >= 4
        bits[listed] &= table[used[listed] // 4 - 1]
        kind = np.arange(len(used))
        kind[(bits == exists[used % 4]).all((1, 2))] = -1
        kind[~bits.any((1, 2))] = -2
        of_key = np.empty(len(seen), dtype=np.int64)
        of_key[used] = kind
        kind = of_key[key]

        kept = kind != -2
        row, col, kind = row[kept], col[kept], kind[kept]
        # Patterns are numbered as they first appear. Of repeated targets NumPy keeps the last, hence backwards.
        partial = np.flatnonzero(kind >= 0)[::-1]
        first = np.full(len(used), -1, dtype=np.int64)
        first[kind[partial]] = partial
        order = np.argsort(first, kind="stable")[np.count_nonzero(first < 0) :]
        size = bits.shape[1] * bits.shape[2]
        numbers: dict[bytes, int] = {}
        number = np.full(len(used), -1, dtype=np.int64)
        number[order] = [
            numbers.setdefault(pattern, len(numbers))
            for pattern in bits[order].reshape(len(order), size).view(f"V{size}").ravel().tolist()
        ]
        patterns = np.zeros((len(numbers), block[0], _stored_bytes(block)), dtype=np.uint8)
        patterns[:, :, : bits.shape[2]] = np.frombuffer(b"".join(numbers), dtype=np.uint8).reshape(-1, *bits.shape[1:])
        inner = np.full(len(kind), -1, dtype=np.int64)
        inner[kind >= 0] = number[kind[kind >= 0]]
        ends = np.concatenate([[0], np.bincount(row, minlength=maps * rows).cumsum()])
        indptr = ends[np.arange(maps)[:, None] * rows + np.arange(rows + 1)].reshape(*shape[:2], rows + 1)
        self.__dict__.update(
            shape=shape,
            block=block,
            indptr=torch.from_numpy(indptr),
            indices=torch.from_numpy(np.ascontiguousarray(col)),
            inner=torch.from_numpy(inner),
            patterns=torch.from_numpy(patterns),
        )
        # Now rather than on demand, where it would have to be traced by a compiler.
        self.__dict__["digest"] = self._hash()

    @classmethod
    def _of(cls, shape: _Shape, block: _Block, row: _Ints, col: _Ints, code: _Ints, table: _Bytes) -> BlockMask:
        """Make a mask of blocks that are known to be in range; see :meth:`_fill`."""
        mask = cls.__new__(cls)
        mask._fill(shape, block, row, col, code, table)
        return mask

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"BlockMask: '{name}' cannot be set, a mask does not change")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"BlockMask: '{name}' cannot be deleted, a mask does not change")

    # --- constructors -------------------------------------------------------------------------------------------------

    @classmethod
    def from_bool(cls, mask: Any, block: int | tuple[int, int] = (64, 64)) -> BlockMask:
        """Take a dense mask apart.

        Parameters
        ----------
        mask : Tensor or numpy.ndarray
            bool, True where a pair is kept: ``(N, M)``, ``(H, N, M)``, ``(1, H, N, M)`` or ``(B, H, N, M)``.
        block : int or tuple of int
            ``(block_q, block_k)``, each from 1 to 1024.

        Returns
        -------
        BlockMask
            One map for ``(N, M)``, else one for each leading index.

        Raises
        ------
        ArgumentError
            Another rank, no map at all, or a block out of range.
        ArgumentTypeError
            Not boolean: neither 0 and 1 nor an additive mask are guessed at.

        Notes
        -----
        One pass over the mask; beyond the result, memory for a few rows of blocks.

        Examples
        --------
        >>> import torch
        >>> from shiftkern.attention import BlockMask
        >>> BlockMask.from_bool(torch.ones(100, 100).tril().bool(), block=32).density
        0.505
        """
        op = "BlockMask.from_bool"
        sides = check_block(op, block)
        dense = _booleans(op, "mask", mask)
        if dense.ndim not in (2, 3, 4) or 0 in dense.shape[:-2]:
            _checks.refuse(op, "mask", "shape (N, M), (H, N, M) or (B, H, N, M)", f"shape {dense.shape}")
        dense = dense[(None,) * (4 - dense.ndim)]
        shape = (dense.shape[0], dense.shape[1], _size(op, "mask", dense.shape[2]), _size(op, "mask", dense.shape[3]))
        rows, _ = _grid(shape, sides)
        step = max(1, _CELLS // max(1, sides[0] * shape[3]))
        pieces = []
        for start, (b, h) in enumerate(np.ndindex(*shape[:2])):
            for first in range(0, rows, step):
                row, col, bits = _packed(dense[b, h, first * sides[0] : (first + step) * sides[0]], sides)
                pieces.append((row + (start * rows + first), col, bits))
        row, col, table = _joined(pieces, sides)
        return cls._of(shape, sides, row, col, np.arange(len(row)), table)

    @classmethod
    def from_bsr(
        cls, indptr: Any, indices: Any, shape: tuple[int, int], block: int | tuple[int, int], inner: Any = None
    ) -> BlockMask:
        """Take block sparse rows, as SciPy's ``bsr_array`` has them.

        Parameters
        ----------
        indptr : Tensor, numpy.ndarray or list
            Integers ``(rows + 1,)``, ``(H, rows + 1)`` or ``(B, H, rows + 1)`` with ``rows = ceil(n_q / block_q)``:
            the blocks of row ``r`` are ``indices[indptr[r]:indptr[r + 1]]``. Offsets are absolute: each map begins
            where the one before ends.
        indices : Tensor, numpy.ndarray or list
            Integers ``(nnz,)``: columns of blocks, in any order within a row, each at most once.
        shape : tuple of int
            ``(n_q, n_k)``. Blocks at the edge may be ragged.
        block : int or tuple of int
            ``(block_q, block_k)``, each from 1 to 1024.
        inner : Tensor or numpy.ndarray, optional
            bool ``(nnz, block_q, block_k)``: the pairs kept in each block, the ones beyond the edge ignored. Without it
            blocks are kept as a whole.

        Returns
        -------
        BlockMask
            Blocks in which ``inner`` keeps nothing are dropped.

        Raises
        ------
        ArgumentError
            Offsets that decrease or do not span ``indices``, columns out of range or listed twice, wrong shapes.
        ArgumentTypeError
            Offsets or columns that are not integers, ``inner`` that is not boolean.

        Examples
        --------
        >>> from shiftkern.attention import BlockMask
        >>> BlockMask.from_bsr([0, 1, 3], [0, 1, 0], (4, 4), 2).to_dense()[0, 0].int().tolist()
        [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
        """
        op = "BlockMask.from_bsr"
        sides, tokens = check_block(op, block), _tokens(op, shape)
        rows, cols = _grid((1, 1, *tokens), sides)
        starts = _whole_numbers(op, "indptr", indptr)
        if starts.ndim not in (1, 2, 3) or starts.shape[-1] != rows + 1 or 0 in starts.shape:
            expected = f"shape ({rows + 1},), (H, {rows + 1}) or (B, H, {rows + 1})"
            _checks.refuse(op, "indptr", expected, f"shape {starts.shape}")
        starts = starts[(None,) * (3 - starts.ndim)]
        row, col, order = _listed_blocks(op, starts, _whole_numbers(op, "indices", indices), cols)
        if inner is None:
            code, table = np.full(len(row), -1, dtype=np.int64), _no_patterns(sides)
        else:
            kept = _booleans(op, "inner", inner)
            if kept.shape != (len(row), *sides):
                _checks.refuse(op, "inner", f"shape {(len(row), *sides)}", f"shape {kept.shape}")
            code, table = order, np.packbits(kept, axis=2, bitorder="little")
        return cls._of((starts.shape[0], starts.shape[1], *tokens), sides, row, col, code, table)

    @classmethod
    def from_kv_blocks(
        cls,
        kv_num_blocks: Any,
        kv_indices: Any,
        full_kv_num_blocks: Any = None,
        full_kv_indices: Any = None,
        block: int | tuple[int, int] = 128,
        mask_mod: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None,
        shape: tuple[int, int] | None = None,
    ) -> BlockMask:
        """Take FlexAttention's lists of partial and full blocks; for a mask object of torch there is :meth:`from_flex`.

        Parameters
        ----------
        kv_num_blocks : Tensor or numpy.ndarray
            Integers ``(B, H, rows)``, ``(H, rows)`` or ``(rows,)``: partial blocks in each row of blocks.
        kv_indices : Tensor or numpy.ndarray
            Integers ``(..., rows, width)``: their columns. What follows the first ``kv_num_blocks`` is ignored.
        full_kv_num_blocks, full_kv_indices : Tensor or numpy.ndarray, optional
            The same for blocks that are kept as a whole.
        block : int or tuple of int
            ``(block_q, block_k)``, each from 1 to 1024.
        mask_mod : callable, optional
            ``mask_mod(b, h, q, k) -> bool tensor``: the pairs kept in partial blocks. It is called with int64 tensors
            that broadcast against each other, existing positions only, once for many blocks; ``b`` and ``h`` count the
            maps. Without it partial blocks are kept as a whole.
        shape : tuple of int, optional
            ``(n_q, n_k)``. Without it every block is complete and ``width`` is the number of columns.

        Returns
        -------
        BlockMask
            Partial blocks in which ``mask_mod`` keeps nothing are dropped.

        Raises
        ------
        ArgumentError
            Counts or columns out of range, a column twice in a row (also: partial and full), shapes that do not fit,
            one of the two arguments for full blocks without the other.
        ArgumentTypeError
            No integers; a ``mask_mod`` that is no function or does not return booleans.

        References
        ----------
        Dong et al.: Flex Attention: A Programming Model for Generating Optimized Attention Kernels (2024).

        Examples
        --------
        >>> import torch
        >>> from shiftkern.attention import BlockMask
        >>> partial, full = torch.tensor([[0, 0], [1, 0]]), torch.tensor([[0, 0], [0, 0]])
        >>> causal = BlockMask.from_kv_blocks(
        ...     torch.tensor([1, 1]), partial, torch.tensor([0, 1]), full, 2, lambda b, h, q, k: q >= k
        ... )
        >>> causal == BlockMask.causal(4, block=2)
        True
        """
        op = "BlockMask.from_kv_blocks"
        sides = check_block(op, block)
        if mask_mod is not None and not callable(mask_mod):
            _checks.refuse_type(op, "mask_mod", "a function or None", _checks.describe(mask_mod))
        if (full_kv_num_blocks is None) != (full_kv_indices is None):
            missing = "full_kv_num_blocks" if full_kv_num_blocks is None else "full_kv_indices"
            _checks.refuse_type(op, missing, "a tensor or array, as the other list of full blocks is given", "None")
        lists = [("kv_", kv_num_blocks, kv_indices)]
        if full_kv_indices is not None:
            lists.append(("full_kv_", full_kv_num_blocks, full_kv_indices))
        found: list[tuple[_Ints, _Ints]] = []
        lead: tuple[int, ...] | None = None
        for name, num_blocks, indices in lists:
            count = _whole_numbers(op, f"{name}num_blocks", num_blocks)
            if count.ndim not in (1, 2, 3) or 0 in count.shape[:-1] or lead not in (None, count.shape):
                expected = "shape (B, H, rows), (H, rows) or (rows,)" if lead is None else f"shape {lead}, as kv_"
                _checks.refuse(op, f"{name}num_blocks", expected, f"shape {count.shape}")
            column = _whole_numbers(op, f"{name}indices", indices)
            if column.shape[:-1] != count.shape or column.ndim != count.ndim + 1:
                _checks.refuse(op, f"{name}indices", f"shape {(*count.shape, 'width')}", f"shape {column.shape}")
            if lead is None:
                lead = count.shape
                complete = (count.shape[-1] * sides[0], column.shape[-1] * sides[1])
                tokens = _tokens(op, complete if shape is None else shape)
                maps = (1, 1, *count.shape[:-1])[-2:]
                full_shape = (maps[0], maps[1], *tokens)
                rows, cols = _grid(full_shape, sides)
                if rows != count.shape[-1]:
                    expected = f"{rows} rows of blocks for {tokens[0]} queries"
                    _checks.refuse(op, f"{name}num_blocks", expected, f"shape {count.shape}")
            if count.size and (count.min() < 0 or count.max() > column.shape[-1]):
                expected = f"numbers from 0 to {column.shape[-1]}"
                _checks.refuse(op, f"{name}num_blocks", expected, f"{count.min()} to {count.max()}")
            used = np.arange(column.shape[-1]) < count[..., None]
            col = column[used]
            _in_range(op, f"{name}indices", col, cols)
            found.append((np.repeat(np.arange(count.size), count.ravel()), col))
        row, col = (np.concatenate(parts) for parts in zip(*found, strict=True))
        code, table = np.full(len(row), -1, dtype=np.int64), _no_patterns(sides)
        if mask_mod is not None:
            n_partial = len(found[0][0])
            code[:n_partial] = np.arange(n_partial)
            device = kv_num_blocks.device if isinstance(kv_num_blocks, Tensor) else torch.device("cpu")
            table = _evaluated(op, mask_mod, full_shape, sides, *found[0], device)
        order = _sorted_once(op, "full_kv_indices" if full_kv_indices is not None else "kv_indices", row, col)
        return cls._of(full_shape, sides, row[order], col[order], code[order], table)

    @classmethod
    def from_flex(cls, block_mask: Any) -> BlockMask:
        """Take a ``torch.nn.attention.flex_attention.BlockMask``, with the function that describes its partial blocks.

        Parameters
        ----------
        block_mask : torch.nn.attention.flex_attention.BlockMask
            On any device.

        Returns
        -------
        BlockMask
            The same pairs, in blocks of the same size.

        Raises
        ------
        ArgumentError
            See :meth:`from_kv_blocks`.
        ArgumentTypeError
            Something else.

        Examples
        --------
        >>> from torch.nn.attention.flex_attention import create_block_mask
        >>> from shiftkern.attention import BlockMask
        >>> flex = create_block_mask(lambda b, h, q, k: q >= k, None, None, 300, 300, device="cpu")
        >>> BlockMask.from_flex(flex) == BlockMask.causal(300, block=128)
        True
        """
        from torch.nn.attention.flex_attention import BlockMask as FlexMask

        if not isinstance(block_mask, FlexMask):
            expected = "a torch.nn.attention.flex_attention.BlockMask"
            _checks.refuse_type("BlockMask.from_flex", "block_mask", expected, _checks.describe(block_mask))
        return cls.from_kv_blocks(
            block_mask.kv_num_blocks,
            block_mask.kv_indices,
            block_mask.full_kv_num_blocks,
            block_mask.full_kv_indices,
            block_mask.BLOCK_SIZE,
            block_mask.mask_mod,
            block_mask.seq_lengths,
        )

    @classmethod
    def sliding_window(
        cls,
        n_q: int,
        n_k: int,
        left: int,
        right: int,
        n_global: int = 0,
        causal: bool = False,
        block: int | tuple[int, int] = (64, 64),
    ) -> BlockMask:
        """Keep a window around each query, and optionally some tokens for all.

        Query ``i`` is the token ``p = i + n_k - n_q``: the last query and the last key are the same token, as in
        FlashAttention. It keeps the keys ``p - left <= j <= p + right``.

        Parameters
        ----------
        n_q, n_k : int
            Queries and keys.
        left, right : int
            Keys to either side of a query's own, at least 0; -1 is unbounded.
        n_global : int
            The tokens ``0 <= t < n_global`` attend to all and are attended to by all.
        causal : bool
            No key after its query (``j <= p``) is kept, neither in the window nor for global tokens.
        block : int or tuple of int
            ``(block_q, block_k)``, each from 1 to 1024.

        Returns
        -------
        BlockMask
            One map.

        Raises
        ------
        ArgumentError
            A number out of range.
        ArgumentTypeError
            No integer, or no boolean.

        Notes
        -----
        O(kept blocks) time and memory: patterns depend on the distance of a block from the diagonal, and are made once.

        References
        ----------
        Beltagy, Peters and Cohan: Longformer: The Long-Document Transformer (2020).

        Examples
        --------
        >>> from shiftkern.attention import BlockMask
        >>> BlockMask.sliding_window(4, 4, 1, 0, n_global=1).to_dense()[0, 0].int().tolist()
        [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 1]]
        >>> BlockMask.sliding_window(1_000_000, 1_000_000, 128, 128).patterns.shape[0]
        2
        """
        op = "BlockMask.sliding_window"
        n_q, n_k = _size(op, "n_q", n_q), _size(op, "n_k", n_k)
        left, right = _checks.integer(op, "left", left, -1), _checks.integer(op, "right", right, -1)
        n_global = min(_checks.integer(op, "n_global", n_global, 0), n_k)
        causal, sides = _checks.flag(op, "causal", causal), check_block(op, block)
        shape = (1, 1, n_q, n_k)
        rows, _ = _grid(shape, sides)
        (block_q, block_k), offset, far = sides, n_k - n_q, n_q + n_k
        least = -far if left < 0 else -min(left, far)
        most = far if right < 0 else min(right, far)
        if causal:
            most = min(most, 0)

        start = np.arange(rows, dtype=np.int64) * block_q
        stop = np.minimum(start + block_q, n_q)
        visible = np.clip(stop + offset, 0, n_k) if causal else np.full(rows, n_k, dtype=np.int64)
        first_global, past_global = max(0, -offset), max(0, n_global - offset)
        is_global = (start < past_global) & (stop > first_global)
        # Two stretches of columns: those of global keys (all, for global queries), and the window's rest.
        shared = -(-np.where(is_global, visible, np.minimum(visible, n_global)) // block_k)
        window = np.clip(start + offset + least, 0, n_k) // block_k
        window_end = -(-np.clip(stop + offset + most, 0, n_k) // block_k)
        stretch, col = _ranges(
            np.stack([np.zeros_like(shared), np.maximum(window, shared)], 1).ravel(),
            np.stack([shared, window_end], 1).ravel(),
        )
        row = stretch // 2

        # A block sees the window's two edges, the last global key and the global queries; beyond an edge all is alike.
        distance = np.clip(col * block_k - row * block_q - offset, least - block_k, most + block_q)
        edges = (
            distance,
            np.clip(n_global - col * block_k, 0, block_k),
            np.clip(first_global - row * block_q, 0, block_q),
            np.clip(past_global - row * block_q, 0, block_q),
        )
        code = np.full(len(row), -1, dtype=np.int64)
        partial = np.flatnonzero((distance < least + block_q - 1) | (distance > most - block_k + 1))
        sample, code[partial] = _distinct(*(edge[partial] for edge in edges))
        query, key = np.arange(block_q)[:, None], np.arange(block_k)
        table = np.empty((len(sample), block_q, -(-block_k // 8)), dtype=np.uint8)
        for bits, values in zip(table, np.stack(edges, 1)[partial[sample]].tolist(), strict=True):
            at, global_keys, query_start, query_stop = values
            ahead = at + key - query
            kept = (least <= ahead) & (ahead <= most) | (key < global_keys)
            kept |= (query_start <= query) & (query < query_stop)
            if causal:
                kept &= ahead <= 0
            bits[:] = np.packbits(kept, axis=1, bitorder="little")
        return cls._of(shape, sides, row, col, code, table)

    @classmethod
    def full(cls, n_q: int, n_k: int, block: int | tuple[int, int] = (64, 64)) -> BlockMask:
        """Keep every pair.

        Parameters
        ----------
        n_q, n_k : int
            Queries and keys.
        block : int or tuple of int
            ``(block_q, block_k)``, each from 1 to 1024.

        Returns
        -------
        BlockMask
            One map, of density 1.

        Raises
        ------
        ArgumentError
            A number out of range.
        ArgumentTypeError
            No integer.

        Examples
        --------
        >>> from shiftkern.attention import BlockMask
        >>> BlockMask.full(100, 50)
        BlockMask(shape=(1, 1, 100, 50), block=(64, 64), density=1)
        """
        op = "BlockMask.full"
        sides = check_block(op, block)
        shape = (1, 1, _size(op, "n_q", n_q), _size(op, "n_k", n_k))
        rows, cols = _grid(shape, sides)
        row, col = np.repeat(np.arange(rows), cols), np.tile(np.arange(cols), rows)
        return cls._of(shape, sides, row, col, np.full(len(row), -1, dtype=np.int64), _no_patterns(sides))

    @classmethod
    def causal(cls, n_q: int, n_k: int | None = None, block: int | tuple[int, int] = (64, 64)) -> BlockMask:
        """Keep the keys ``j <= i + n_k - n_q``: up to the query's own token, the last tokens being the same.

        Parameters
        ----------
        n_q, n_k : int
            Queries and keys; without ``n_k`` as many keys as queries.
        block : int or tuple of int
            ``(block_q, block_k)``, each from 1 to 1024.

        Returns
        -------
        BlockMask
            One map.

        Raises
        ------
        ArgumentError
            A number out of range.
        ArgumentTypeError
            No integer.

        Examples
        --------
        >>> from shiftkern.attention import BlockMask
        >>> BlockMask.causal(2, 4, block=2).to_dense()[0, 0].int().tolist()
        [[1, 1, 1, 0], [1, 1, 1, 1]]
        """
        return cls.sliding_window(n_q, n_q if n_k is None else n_k, -1, 0, block=block)

    @classmethod
    def frames(
        cls, n_text: int, n_frames: int, frame_size: int, window: int, block: int | tuple[int, int] = (64, 64)
    ) -> BlockMask:
        """Keep the same window in every frame of a video, and text tokens for all.

        Tokens are ``n_text`` of text, then ``n_frames`` frames of ``frame_size``. Position ``p`` of a frame keeps the
        positions ``p'`` with ``|p - p'| <= window`` of every frame. Text attends to all and is attended to by all.

        Parameters
        ----------
        n_text : int
            Text tokens, which come first; at least 0.
        n_frames, frame_size : int
            Frames, and tokens in each; at least 1.
        window : int
            Positions to either side; at least 0, or -1 for all.
        block : int or tuple of int
            ``(block_q, block_k)``, each from 1 to 1024.

        Returns
        -------
        BlockMask
            One map of ``n_text + n_frames * frame_size`` queries and keys.

        Raises
        ------
        ArgumentError
            A number out of range.
        ArgumentTypeError
            No integer.

        Notes
        -----
        ``min(rows, frame_size / gcd(frame_size, block_q))`` rows of blocks are written out and the others repeat them:
        frames that are a multiple of the block make few patterns, odd ones many.

        References
        ----------
        Chen et al.: Re-ttention: Ultra Sparse Visual Generation via Attention Statistical Reshape (2025).

        Examples
        --------
        >>> from shiftkern.attention import BlockMask
        >>> BlockMask.frames(1, 2, 2, 0).to_dense()[0, 0].int().tolist()
        [[1, 1, 1, 1, 1], [1, 1, 0, 1, 0], [1, 0, 1, 0, 1], [1, 1, 0, 1, 0], [1, 0, 1, 0, 1]]
        """
        op = "BlockMask.frames"
        n_text = _checks.integer(op, "n_text", n_text, 0)
        n_frames = _checks.positive_int(op, "n_frames", n_frames)
        frame_size = _checks.positive_int(op, "frame_size", frame_size)
        window = _checks.integer(op, "window", window, -1)
        sides = check_block(op, block)
        n = _size(op, "n_frames", n_text + n_frames * frame_size)
        rows, _ = _grid((1, 1, n, n), sides)
        start = np.arange(rows, dtype=np.int64) * sides[0]
        # Rows of blocks without text look alike when they begin at the same position of a frame.
        alike = np.where(start < n_text, -1 - start, (start - n_text) % frame_size)
        sample, group = _distinct(alike)
        place = (np.arange(n) - n_text) % frame_size
        text = np.arange(n) < n_text
        reach = frame_size if window < 0 else min(window, frame_size)
        pieces = []
        for number, first in enumerate(start[sample].tolist()):
            # Where a frame ends before the block does, positions go on in the next one; rows beyond the last token
            # are those of a further frame and are cut off in the end.
            query = np.arange(first, first + sides[0])
            kept = np.abs((query[:, None] - n_text) % frame_size - place) <= reach
            kept |= text | (query < n_text)[:, None]
            _, col, bits = _packed(kept, sides)
            pieces.append((np.full(len(col), number), col, bits))
        of_group, columns, table = _joined(pieces, sides)
        ends = np.searchsorted(of_group, np.arange(len(sample) + 1))
        row, source = _ranges(ends[group], ends[group + 1])
        return cls._of((1, 1, n, n), sides, row, columns[source], source, table)

    @classmethod
    def vertical_slash(
        cls, v_idx: Any, s_idx: Any, n: int, causal: bool = True, block: int | tuple[int, int] = (64, 64)
    ) -> BlockMask:
        """Keep some keys for every query, and some distances between query and key.

        The pair of query ``i`` and key ``j`` is kept where ``j`` is in ``v_idx`` or ``i - j`` is in ``s_idx``, and,
        if causal, ``j <= i``.

        Parameters
        ----------
        v_idx : Tensor, numpy.ndarray or list
            Keys, integers in ``[0, n)``: ``(k,)``, ``(H, k)`` for heads of their own, or ``(B, H, k)``.
        s_idx : Tensor, numpy.ndarray or list
            Distances, integers in ``[0, n)``, or in ``(-n, n)`` if not causal: ``(k,)``, ``(H, k)`` or ``(B, H, k)``;
            ``k`` may differ from that of ``v_idx``.
        n : int
            Queries, and as many keys.
        causal : bool
            Keep no key after its query.
        block : int or tuple of int
            ``(block_q, block_k)``, each from 1 to 1024.

        Returns
        -------
        BlockMask
            One map, or one for each head, or for each batch and head.

        Raises
        ------
        ArgumentError
            An index or number out of range, or batches or heads that do not fit.
        ArgumentTypeError
            No integers, or no boolean.

        Notes
        -----
        Single pairs, not whole blocks around them, are kept. Every block in which a kept key and a kept distance meet
        has a pattern of its own. O(rows * columns) time over all blocks, and O(kept blocks) memory.

        References
        ----------
        Jiang et al.: MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention
        (2024).

        Examples
        --------
        >>> from shiftkern.attention import BlockMask
        >>> BlockMask.vertical_slash([0], [0, 2], 4).to_dense()[0, 0].int().tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]
        """
        op = "BlockMask.vertical_slash"
        n = _size(op, "n", n)
        causal, sides = _checks.flag(op, "causal", causal), check_block(op, block)
        chosen = []
        for name, value, low in (("v_idx", v_idx, 0), ("s_idx", s_idx, 0 if causal else 1 - n)):
            index = _whole_numbers(op, name, value)
            if index.ndim not in (1, 2, 3) or 0 in index.shape[:-1]:
                _checks.refuse(op, name, "shape (k,), (H, k) or (B, H, k)", f"shape {index.shape}")
            _in_range(op, name, index, n, low)
            chosen.append(index[(None,) * (3 - index.ndim)])
        maps = tuple(max(v, s) for v, s in zip(chosen[0].shape[:2], chosen[1].shape[:2], strict=True))
        for name, index in zip(("v_idx", "s_idx"), chosen, strict=True):
            if any(have not in (1, want) for have, want in zip(index.shape[:2], maps, strict=True)):
                expected = f"1 or {maps[0]} batches of 1 or {maps[1]} heads, as the other index"
                _checks.refuse(op, name, expected, f"{index.shape[0]} of {index.shape[1]}")
        shape = (maps[0], maps[1], n, n)
        keys, distances = (np.broadcast_to(index, (*maps, index.shape[2])) for index in chosen)
        rows, _ = _grid(shape, sides)
        parts = [
            _crossings(keys[at], distances[at], n, causal, sides) for at in np.ndindex(*maps)
        ]  # (row, col, code, table) for each map
        sizes = np.cumsum([0, *(len(part[3]) for part in parts)])
        row = np.concatenate([part[0] + m * rows for m, part in enumerate(parts)])
        col = np.concatenate([part[1] for part in parts])
        code = np.concatenate([part[2] + size for size, part in zip(sizes, parts, strict=False)])
        return cls._of(shape, sides, row, col, code, np.concatenate([part[3] for part in parts]))

    @classmethod
    def stack(cls, masks: Sequence[BlockMask]) -> BlockMask:
        """Give each head a mask of its own.

        Parameters
        ----------
        masks : sequence of BlockMask
            One mask with a single map for each head, all of the same shape and block.

        Returns
        -------
        BlockMask
            Of shape ``(1, H, n_q, n_k)``.

        Raises
        ------
        ArgumentError
            No mask, several maps in one, or shapes or blocks that differ.
        ArgumentTypeError
            Something else than masks.

        Examples
        --------
        >>> from shiftkern.attention import BlockMask
        >>> BlockMask.stack([BlockMask.causal(100), BlockMask.full(100, 100)]).shape
        (1, 2, 100, 100)
        """
        op = "BlockMask.stack"
        check_alike(op, masks)
        for mask in masks:
            if mask.shape[:2] != (1, 1):
                _checks.refuse(op, "masks", "masks with one map each", f"shape {mask.shape}")
        return cls._heads([(mask, 0) for mask in masks])

    @classmethod
    def _heads(cls, picks: Sequence[tuple[BlockMask, int]]) -> BlockMask:
        """Gather maps ``(mask, head)`` of masks without batches into one mask."""
        model = picks[0][0]
        rows, _ = _grid(model.shape, model.block)
        width = -(-model.block[1] // 8)
        distinct = {id(mask): mask for mask, _ in picks}
        tables = [mask.patterns.numpy()[:, :, :width] for mask in distinct.values()]
        base = dict(zip(distinct, np.cumsum([0, *map(len, tables)]).tolist(), strict=False))
        parts = []
        for number, (mask, head) in enumerate(picks):
            starts = mask.indptr.numpy()[0, head]
            here = slice(starts[0], starts[-1])
            inner = mask.inner.numpy()[here]
            code = np.where(inner < 0, -1, inner + base[id(mask)])
            parts.append(
                (np.repeat(np.arange(rows) + number * rows, np.diff(starts)), mask.indices.numpy()[here], code)
            )
        row, col, code = (np.concatenate(column) for column in zip(*parts, strict=True))
        return cls._of((1, len(picks), *model.shape[2:]), model.block, row, col, code, np.concatenate(tables))

    # --- what it holds ------------------------------------------------------------------------------------------------

    @cached_property
    def kept_pairs(self) -> Tensor:
        """Kept pairs of each map, int64 ``(maps_b, maps_h)``."""
        rows, cols = _grid(self.shape, self.block)
        heights, widths = (
            np.minimum(side, n - np.arange(count) * side)
            for side, n, count in zip(self.block, self.shape[2:], (rows, cols), strict=True)
        )
        inner = self.inner.numpy()
        whole = inner < 0
        pairs = np.empty(len(inner), dtype=np.int64)
        pairs[whole] = heights[self._row()[whole] % max(rows, 1)] * widths[self.indices.numpy()[whole]]
        pairs[~whole] = _ONES[self.patterns.numpy()].sum((1, 2), dtype=np.int64)[inner[~whole]]
        ends = np.concatenate([[0], pairs.cumsum()])[self.indptr.numpy()]
        return torch.from_numpy(ends[..., -1] - ends[..., 0])

    def _row(self) -> _Ints:
        """Row of each kept block, counted over all maps."""
        counts = np.diff(self.indptr.numpy()).ravel()
        return np.repeat(np.arange(len(counts)), counts)

    @property
    def n_kept_pairs(self) -> int:
        """Kept pairs, over all maps."""
        return int(self.kept_pairs.sum())

    @property
    def density(self) -> float:
        """Kept pairs among all; 0 where there are none at all."""
        pairs = self.shape[0] * self.shape[1] * self.shape[2] * self.shape[3]
        return self.n_kept_pairs / pairs if pairs else 0.0

    @property
    def block_density(self) -> float:
        """Kept blocks, full or partial, among all: the part of the work that is left."""
        rows, cols = _grid(self.shape, self.block)
        blocks = self.shape[0] * self.shape[1] * rows * cols
        return len(self.indices) / blocks if blocks else 0.0

    def _hash(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        digest.update(np.array([*self.shape, *self.block, len(self.indices)], dtype="<i8").tobytes())
        for array in (self.indptr, self.indices, self.inner):
            digest.update(array.numpy().astype("<i8", copy=False).data)
        digest.update(self.patterns.numpy().tobytes())
        return digest.hexdigest()

    def to_dense(self, rows: Any = None) -> Tensor:
        """Write the mask out.

        Parameters
        ----------
        rows : Tensor, numpy.ndarray or list, optional
            Integers ``(R,)`` in ``[0, n_q)``: the queries that are wanted, in this order.

        Returns
        -------
        Tensor
            bool ``(maps_b, maps_h, n_q, n_k)``, or ``(maps_b, maps_h, R, n_k)``; True where a pair is kept.

        Raises
        ------
        ArgumentError
            A query out of range, or no vector.
        ArgumentTypeError
            No integers.

        Examples
        --------
        >>> from shiftkern.attention import BlockMask
        >>> BlockMask.causal(5).to_dense(rows=[1, 3])[0, 0].int().tolist()
        [[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]
        """
        op = "BlockMask.to_dense"
        n_q, n_k = self.shape[2:]
        query = np.arange(n_q) if rows is None else _whole_numbers(op, "rows", rows)
        if query.ndim != 1:
            _checks.refuse(op, "rows", "shape (R,)", f"shape {query.shape}")
        _in_range(op, "rows", query, n_q)
        block_q, block_k = self.block
        _, cols = _grid(self.shape, self.block)
        indptr, indices, inner = self.indptr.numpy(), self.indices.numpy(), self.inner.numpy()
        patterns = self.patterns.numpy()
        out = np.zeros((*self.shape[:2], len(query), n_k), dtype=np.bool_)
        touched = [(r, np.flatnonzero(query // block_q == r)) for r in np.unique(query // block_q).tolist()]
        for at in np.ndindex(*self.shape[:2]):
            for r, wanted in touched:
                here = slice(indptr[*at, r], indptr[*at, r + 1])
                band = np.zeros((len(wanted), cols, block_k), dtype=np.bool_)
                kind, col = inner[here], indices[here]
                band[:, col[kind < 0]] = True
                bits = patterns[kind[kind >= 0]][:, query[wanted] % block_q]
                cells = np.unpackbits(bits, axis=2, count=block_k, bitorder="little")
                band[:, col[kind >= 0]] = cells.transpose(1, 0, 2)
                out[at][wanted] = band.reshape(len(wanted), cols * block_k)[:, :n_k]
        return torch.from_numpy(out)

    def state_dict(self) -> dict[str, Any]:
        """Return the mask as a dictionary of tensors and tuples of integers.

        Returns
        -------
        dict
            ``shape``, ``block``, ``indptr``, ``indices``, ``inner`` and ``patterns``; the tensors are the mask's own.

        Examples
        --------
        >>> from shiftkern.attention import BlockMask
        >>> mask = BlockMask.causal(100)
        >>> BlockMask.from_state_dict(mask.state_dict()) == mask
        True
        """
        return {name: getattr(self, name) for name in _STATE}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> BlockMask:
        """Return the mask that :meth:`state_dict` described.

        Parameters
        ----------
        state : dict
            As :meth:`state_dict` returned it; everything is checked.

        Returns
        -------
        BlockMask
            An equal mask with tensors of its own.

        Raises
        ------
        ArgumentError
            Other keys, or arrays that are no mask.
        ArgumentTypeError
            No dictionary, or values of a wrong type.

        Examples
        --------
        >>> from shiftkern.attention import BlockMask
        >>> mask = BlockMask.sliding_window(100, 100, 8, 8)
        >>> BlockMask.from_state_dict(mask.state_dict()).digest == mask.digest
        True
        """
        op = "BlockMask.from_state_dict"
        if not isinstance(state, Mapping):
            _checks.refuse_type(op, "state", "a dictionary", _checks.describe(state))
        if set(state) != set(_STATE):
            _checks.refuse(op, "state", f"the keys {', '.join(_STATE)}", ", ".join(map(str, state)) or "none")
        return cls(**state)

    def plot(self, ax: Any = None, head: int = 0, batch: int = 0) -> Any:
        """Draw which blocks are full, partial and empty.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            Where to draw; a new figure otherwise.
        head, batch : int
            The map.

        Returns
        -------
        matplotlib.axes.Axes
            Rows of blocks downwards, columns to the right. In masks of more than 1000 blocks to a side a cell stands
            for several.

        Raises
        ------
        ArgumentError
            No such map.
        ArgumentTypeError
            No integer, or no axes.
        ImportError
            There is no matplotlib.

        Examples
        --------
        >>> from shiftkern.attention import BlockMask
        >>> BlockMask.causal(1000).plot().get_title()  # doctest: +SKIP
        'density 0.5005'
        """
        op = "BlockMask.plot"
        for name, number, maps in (("batch", batch, self.shape[0]), ("head", head, self.shape[1])):
            if _checks.integer(op, name, number, 0) >= maps:
                _checks.refuse(op, name, f"a number below {maps}", number)
        try:
            import matplotlib.pyplot as plt
            from matplotlib.axes import Axes
            from matplotlib.colors import ListedColormap
            from matplotlib.patches import Patch
        except ImportError as error:
            raise ImportError(f"{op} needs matplotlib: pip install shiftkern[demo]") from error
        if ax is None:
            _, ax = plt.subplots()
        elif not isinstance(ax, Axes):
            _checks.refuse_type(op, "ax", "matplotlib axes", _checks.describe(ax))
        rows, cols = _grid(self.shape, self.block)
        step = max(1, -(-max(rows, cols) // _PICTURE))
        height, width = max(1, -(-rows // step)), max(1, -(-cols // step))
        starts = self.indptr.numpy()[batch, head]
        here = slice(starts[0], starts[-1])
        cell = np.repeat(np.arange(rows) // step, np.diff(starts)) * width + self.indices.numpy()[here] // step
        present, whole = (
            np.bincount(part, minlength=height * width).reshape(height, width)
            for part in (cell, cell[self.inner.numpy()[here] < 0])
        )
        blocks = np.outer(*(np.minimum(step, n - np.arange(m) * step) for n, m in ((rows, height), (cols, width))))
        state = np.where((whole == blocks) & (present > 0), 2, present > 0)
        # A sequential scale, darker for more, that also reads in grey and with colour-blind eyes.
        colours = ("#f4f4f4", "#86bbd8", "#0b4f8a")
        extent = (-0.5, width * step - 0.5, height * step - 0.5, -0.5)
        ax.imshow(state, cmap=ListedColormap(colours), vmin=0, vmax=2, interpolation="nearest", extent=extent)
        handles = [Patch(facecolor=c, edgecolor="grey", label=t) for c, t in zip(colours, _KINDS, strict=True)]
        ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, frameon=False)
        ax.set_xlabel(f"blocks of {self.block[1]} keys")
        ax.set_ylabel(f"blocks of {self.block[0]} queries")
        pairs = max(1, self.shape[2] * self.shape[3])
        ax.set_title(f"density {int(self.kept_pairs[batch, head]) / pairs:.4g}")
        return ax

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockMask):
            return NotImplemented
        return (self.shape, self.block) == (other.shape, other.block) and all(
            torch.equal(getattr(self, name), getattr(other, name)) for name in _STATE[2:]
        )

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"BlockMask(shape={self.shape}, block={self.block}, density={self.density:.3g})"

    def __reduce__(self) -> tuple[Any, ...]:
        return BlockMask, tuple(self.state_dict().values())


_KINDS = ("empty", "partial", "full")


def check_alike(op: str, masks: Any) -> None:
    """Refuse anything but a list of masks of the same tokens in the same blocks."""
    if not isinstance(masks, (list, tuple)):
        _checks.refuse_type(op, "masks", "a list of BlockMask", _checks.describe(masks))
    if not masks:
        _checks.refuse(op, "masks", "at least one mask", "none")
    for mask in masks:
        if not isinstance(mask, BlockMask):
            _checks.refuse_type(op, "masks", "a list of BlockMask", f"one with {_checks.describe(mask)}")
        if mask.shape[2:] != masks[0].shape[2:] or mask.block != masks[0].block:
            wanted = f"{masks[0].shape[2:]} pairs in blocks {masks[0].block}, as in the first mask"
            _checks.refuse(op, "masks", wanted, f"{mask.shape[2:]} in blocks {mask.block}")


def check_block(op: str, block: Any) -> _Block:
    """Return ``(block_q, block_k)``."""
    if isinstance(block, (tuple, list)):
        if len(block) != 2:
            _checks.refuse(op, "block", "one or two integers", _checks.describe(block))
        pair = tuple(block)
    else:
        pair = (block, block)
    first, second = (_checks.positive_int(op, "block", side) for side in pair)
    if max(first, second) > _SIDE:
        _checks.refuse(op, "block", f"sides of at most {_SIDE}", (first, second))
    return first, second


def _size(op: str, name: str, count: Any) -> int:
    """Return a number of tokens."""
    size = _checks.integer(op, name, count, 0)
    if size > _TOKENS:
        _checks.refuse(op, name, f"at most {_TOKENS} tokens", size)
    return size


def _tokens(op: str, shape: Any) -> tuple[int, int]:
    """Return ``(n_q, n_k)``."""
    if not isinstance(shape, (tuple, list)) or len(shape) != 2:
        _checks.refuse_type(op, "shape", "(n_q, n_k)", _checks.describe(shape))
    return _size(op, "shape", shape[0]), _size(op, "shape", shape[1])


def _grid(shape: tuple[int, ...], block: _Block) -> tuple[int, int]:
    """Count rows and columns of blocks."""
    return -(-shape[2] // block[0]), -(-shape[3] // block[1])


def _stored_bytes(block: _Block) -> int:
    return 4 * -(-block[1] // 32)


def _no_patterns(block: _Block) -> _Bytes:
    return np.empty((0, block[0], -(-block[1] // 8)), dtype=np.uint8)


def _edge_sizes(shape: _Shape, block: _Block) -> list[_Block]:
    """Sizes of a block in the middle, at the right edge, at the bottom, and in the corner."""
    height, width = (n % side or side for n, side in zip(shape[2:], block, strict=True))
    return [block, (block[0], width), (height, block[1]), (height, width)]


def _corner(block: _Block, height: int, width: int) -> _Bytes:
    """Pack a block whose upper left ``height x width`` pairs are kept."""
    kept = np.zeros(block, dtype=np.bool_)
    kept[:height, :width] = True
    return np.packbits(kept, axis=1, bitorder="little")


def _packed(band: _Bools, block: _Block) -> tuple[_Ints, _Ints, _Bytes]:
    """Find the blocks of a dense band in which something is kept: rows, columns and packed bits."""
    rows, cols = _grid((1, 1, *band.shape), block)
    if band.shape != (rows * block[0], cols * block[1]):
        ragged = band
        band = np.zeros((rows * block[0], cols * block[1]), dtype=np.bool_)
        band[: ragged.shape[0], : ragged.shape[1]] = ragged
    packed = np.packbits(band.reshape(rows, block[0], cols, block[1]), axis=3, bitorder="little")
    row, col = np.nonzero(packed.any((1, 3)))
    return row, col, packed.transpose(0, 2, 1, 3)[row, col]


def _joined(pieces: list[tuple[_Ints, _Ints, _Bytes]], block: _Block) -> tuple[_Ints, _Ints, _Bytes]:
    """Join the blocks of several bands, of which there may be none."""
    none = np.empty(0, dtype=np.int64)
    row, col, bits = (np.concatenate(part) for part in zip((none, none, _no_patterns(block)), *pieces, strict=True))
    return row, col, bits


def _ranges(start: _Ints, stop: _Ints) -> tuple[_Ints, _Ints]:
    """Join the ranges ``start[i]:stop[i]``; returns ``i`` and the number, for each number."""
    count = np.maximum(stop - start, 0)
    owner = np.repeat(np.arange(len(count)), count)
    return owner, np.arange(len(owner)) + (start - (count.cumsum() - count))[owner]


def _distinct(*columns: _Ints) -> tuple[_Ints, _Ints]:
    """Find the distinct rows of a table given by its columns: where each is first, and which one each row is."""
    which = np.zeros(len(columns[0]), dtype=np.int64)
    for column in columns:
        values, number = np.unique(column, return_inverse=True)
        _, first, which = np.unique(which * (len(values) + 1) + number, return_index=True, return_inverse=True)
    return first, which


def _whole_numbers(op: str, name: str, value: Any) -> _Ints:
    """Return an int64 array of a tensor, array or list of integers."""
    kind = "a tensor or array of integers"
    if isinstance(value, Tensor):
        array = _checks.tensor(op, name, value, dtypes=_INTEGERS).detach().cpu().numpy()
    elif isinstance(value, (np.ndarray, list, tuple)):
        try:
            array = np.asarray(value)
        except (ValueError, OverflowError):
            _checks.refuse_type(op, name, kind, _checks.describe(value))
        if array.size == 0 and not isinstance(value, np.ndarray):
            array = array.astype(np.int64)
    else:
        _checks.refuse_type(op, name, kind, _checks.describe(value))
    if array.dtype.kind not in "iu":
        _checks.refuse_type(op, name, kind, f"dtype {array.dtype}")
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        _checks.refuse(op, name, "numbers below 2**63", array.max())
    return array.astype(np.int64, copy=False)


_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


def _booleans(op: str, name: str, value: Any) -> _Bools:
    """Return a boolean tensor or array as an array."""
    if isinstance(value, np.ndarray):
        if value.dtype != np.bool_:
            _checks.refuse_type(op, name, "a tensor or array of dtype bool", f"dtype {value.dtype}")
        return value
    if not isinstance(value, Tensor):
        _checks.refuse_type(op, name, "a tensor or array of dtype bool", _checks.describe(value))
    array: _Bools = _checks.tensor(op, name, value, dtypes=(torch.bool,)).cpu().numpy()
    return array


def _in_range(op: str, name: str, values: _Ints, stop: int, start: int = 0) -> None:
    if values.size and (values.min() < start or values.max() >= stop):
        wrong = values.min() if values.min() < start else values.max()
        _checks.refuse(op, name, f"numbers from {start} to {stop - 1}", wrong)


def _sorted_once(op: str, name: str, row: _Ints, col: _Ints) -> _Ints:
    """Order blocks by row and column, and refuse one that is there twice."""
    order = np.lexsort((col, row))
    again = (np.diff(row[order]) == 0) & (np.diff(col[order]) == 0)
    if again.any():
        column = col[order][1:][again][0]
        _checks.refuse(op, name, "each column at most once in a row", f"column {column} twice")
    return order


def _listed_blocks(op: str, indptr: _Ints, indices: _Ints, cols: int) -> tuple[_Ints, _Ints, _Ints]:
    """Check lists of blocks ``(maps_b, maps_h, rows + 1)``; returns rows and columns in order, and that order."""
    if indices.ndim != 1:
        _checks.refuse(op, "indices", "shape (nnz,)", f"shape {indices.shape}")
    starts = indptr.reshape(-1, indptr.shape[-1])
    # The range comes first: differences of numbers within it cannot overflow.
    _in_range(op, "indptr", starts, len(indices) + 1)
    if (np.diff(starts) < 0).any():
        _checks.refuse(op, "indptr", "offsets that do not decrease", "some that do")
    if starts[0, 0] != 0 or starts[-1, -1] != len(indices):
        _checks.refuse(op, "indptr", f"offsets from 0 to {len(indices)}", f"{starts[0, 0]} to {starts[-1, -1]}")
    if (starts[1:, 0] != starts[:-1, -1]).any():
        _checks.refuse(op, "indptr", "maps that begin where the one before ends", "others")
    _in_range(op, "indices", indices, cols)
    counts = np.diff(starts).ravel()
    row = np.repeat(np.arange(len(counts)), counts)
    order = _sorted_once(op, "indices", row, indices)
    return row, indices[order], order


def _evaluated(
    op: str,
    mask_mod: Callable[..., Any],
    shape: tuple[int, ...],
    block: _Block,
    row: _Ints,
    col: _Ints,
    device: torch.device,
) -> _Bytes:
    """Pack what ``mask_mod`` keeps in some blocks."""
    rows, _ = _grid(shape, block)
    table = np.empty((len(row), block[0], -(-block[1] // 8)), dtype=np.uint8)
    step = max(1, _CELLS // (block[0] * block[1]))
    for first in range(0, len(row), step):
        here = slice(first, first + step)
        at = torch.from_numpy(row[here]).to(device).reshape(-1, 1, 1)
        column = torch.from_numpy(col[here]).to(device).reshape(-1, 1, 1)
        # Functions look positions up in tensors of their own: those beyond the edge must not be asked for.
        query = (at % rows * block[0] + torch.arange(block[0], device=device)[:, None]).clamp(max=shape[2] - 1)
        key = (column * block[1] + torch.arange(block[1], device=device)).clamp(max=shape[3] - 1)
        kept = mask_mod(at // rows // shape[1], at // rows % shape[1], query, key)
        if not isinstance(kept, Tensor) or kept.dtype != torch.bool:
            _checks.refuse_type(op, "mask_mod", "a function that returns a bool tensor", _checks.describe(kept))
        try:
            kept = kept.broadcast_to(len(at), *block)
        except RuntimeError:
            _checks.refuse(op, "mask_mod", f"a result for pairs {(len(at), *block)}", f"shape {tuple(kept.shape)}")
        table[here] = np.packbits(kept.cpu().numpy(), axis=2, bitorder="little")
    return table


def _crossings(
    keys: _Ints, distances: _Ints, n: int, causal: bool, block: _Block
) -> tuple[_Ints, _Ints, _Ints, _Bytes]:
    """List the blocks of one map of kept keys and distances: row, column, pattern; and the patterns."""
    (block_q, block_k), (rows, cols) = block, _grid((1, 1, n, n), block)
    keys, distances = np.unique(keys), np.unique(distances)
    found = [(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))]
    step = max(1, _CELLS // max(1, cols + len(distances)))
    for start in range(0, rows, step):
        at = np.arange(start, min(start + step, rows))[:, None]
        kept = np.zeros((len(at), cols), dtype=np.bool_)
        kept[:, keys // block_k] = True
        if causal:
            kept &= np.arange(cols) * block_k < (at + 1) * block_q
        # The queries of a block meet a diagonal in neighbouring columns.
        first, last = (at * block_q - distances) // block_k, ((at + 1) * block_q - 1 - distances) // block_k
        for further in range(-(-(block_q - 1) // block_k) + 1):
            met = (first + further <= last) & (first + further >= 0) & (first + further < cols)
            row, which = np.nonzero(met)
            kept[row, (first + further)[row, which]] = True
        row, col = np.nonzero(kept)
        found.append((row + start, col))
    row, col = (np.concatenate(part) for part in zip(*found, strict=True))

    # What the diagonals leave depends on the place of a block relative to the main diagonal.
    sample, place = _distinct(col * block_k - row * block_q)
    ahead = (col * block_k - row * block_q)[sample]
    is_kept = np.zeros(2 * (n + max(block)), dtype=np.bool_)
    is_kept[n + max(block) - distances] = True
    inside = np.arange(block_k) - np.arange(block_q)[:, None]
    slashes, allowed = (np.empty((len(ahead), block_q, -(-block_k // 8)), dtype=np.uint8) for _ in range(2))
    step = max(1, _CELLS // (block_q * block_k))
    for start in range(0, len(ahead), step):
        here = slice(start, start + step)
        difference = ahead[here, None, None] + inside
        slashes[here] = np.packbits(is_kept[difference + n + max(block)], axis=2, bitorder="little")
        allowed[here] = np.packbits((difference <= 0) | np.bool_(not causal), axis=2, bitorder="little")
    # Away from all diagonals one place is as good as another: there the keys alone matter.
    plain = ~slashes.any((1, 2)) & (allowed == _corner(block, *block)).all((1, 2))
    place = np.where(plain[place], np.argmax(plain) if plain.any() else 0, place)
    verticals = np.zeros((cols + 1, block_k), dtype=np.bool_)
    verticals[keys // block_k, keys % block_k] = True
    columns = np.packbits(verticals, axis=1, bitorder="little")
    column = np.where(np.isin(col, keys // block_k), col, cols)  # columns without a kept key are as one
    sample, code = _distinct(place, column)
    table = slashes[place[sample]] | (columns[column[sample], None] & allowed[place[sample]])
    return row, col, code, table
