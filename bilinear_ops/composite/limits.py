"""The sizes of blocks, tiles and groups, in one record that is read at every call: nothing keeps a copy of them.

Results do not depend on them, only speed and memory do. Tests shrink them to a few elements, so that every loop runs
more than once.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Limits:
    """Elements, unless a name or comment says otherwise."""

    block: int = 1 << 21  # of the largest intermediate of a block: 8 MB in fp32

    # gated
    small_on_cpu: int = 1 << 28  # tokens x d x h up to which eager PyTorch is faster: by 15 % at 2^26, 5 % at 2^28
    cached_bytes: int = 1 << 20  # of each matrix in a block of rows: several fit the last-level cache, blocks are few
    gradient_bytes: int = 8 << 20  # of [da | dz] in a block of rows: an allocator reuses such a block
    gradient_rows: int = 128  # for each thread, at least: fewer make the library's products slow

    # interaction
    khatri_rao: int = 1 << 20  # of S formed at a time: 4 MB in fp32, small enough to stay in the last-level cache
    pair_rows: int = 16  # rows of a tile of pairs: fewer waste less on the diagonal, more make longer runs in a store
    product: int = 1 << 22  # of C S formed at a time
    loop_max: int = 48  # the most directions for which one at a time is the faster order: 32 to 64 at d = 64 to 512
    scores: int = 1 << 21  # of a tile of scores: 8 MB in fp32
    matrices: int = 1 << 24  # of the interaction matrices held at a time: 64 MB in fp32
    ranked: int = 1 << 20  # of those held beside a tile of scores on CPU: 4 MB in fp32
    at_once: int = 1 << 20  # of the largest intermediate of a ranking that is one sort: streamed, calls cost more
    sorted: int = 1 << 18  # of such a ranking held at a time: one matrix of 256 features as a loop over outputs does
    candidates: int = 1 << 12  # of a ranking offered before they are sorted into what is kept
    features: int = 1 << 25  # up to which W D [h, F] is formed whole rather than row by row
    eigenvectors: int = 1 << 20  # gathered at a time: 4 MB in fp32, which stays in the cache
    neurons: int = 1 << 10  # on each side of a tile of `layer_inner`
    gram_neurons: int = 1 << 9  # on each side of a tile of the Gram matrices of `hosvd`

    # rank1
    draws: int = 1 << 15  # words: 256 KiB and as much scratch stay in a core's second-level cache
    device_draws: int = 1 << 24  # words on other devices than the CPU, which want few launches
    slab: int = 1 << 22  # of masked activations: 16 MiB in fp32, tall enough for the library's GEMM at any C
    kept_masks: int = 1 << 17  # of all samples' masks that eager PyTorch keeps: drawn twice, calls cost more
    band: int = 1 << 20  # of the residual held at a time: 4 MiB in fp32
    # of a block of gate networks, of which a few stay in a core's cache from one elementwise pass to the next: on one
    # AVX-512 core at C = 768, blocks of 2^14 and 2^16 elements take 3.8 and 1.6 times as long, of 2^19 no less
    gate_elements: int = 1 << 18
    gate_columns: int = 1 << 10  # subcomponents of such a block: the sums over its tokens are long whatever C is
    active_rows: int = 1 << 20  # of the active subcomponents' vectors gathered at a time: 4 MiB in fp32


limits = Limits()
