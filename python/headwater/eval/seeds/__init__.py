"""The experiments of the papers that the sparse policies come from, on a model of ours: python -m headwater.eval MODEL
--report seeds --help.

1 .latency     time of prefill a token                      SharePrefill (arXiv:2505.19578)
2 .dense_heads how many heads are computed in full          SharePrefill
3 .audit       likeness of heads' masks, and over prompts   SharePrefill
4 .skeleton    perplexity, FLOP, sparsity, criteria         SparseSkeleton
5 .flex_sweep  gamma and tau                                FlexPrefill (arXiv:2502.20766)
6 .flash       speed-up over dense attention                FlashPrefill (arXiv:2603.06199, 2608.19758)

An experiment is a list of cells (.bench), each of which is measured by itself; rows, tables and pictures are made of what
its cells left (.report). A cell that fails or is out of time is named and does not end the others; the same command again
takes up what stands in DIR.
"""
