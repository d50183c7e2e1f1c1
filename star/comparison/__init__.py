"""Search algorithms compared over a table of genomes that were trained once.

table       the file of evaluated genomes (star table)
again       genomes of a table trained once more with further seeds (star table --again)
seeds       what the seed alone does to a trained objective
surrogate   what a trained objective would be for a genome that the table does not hold
replay      the algorithms over table and surrogate, their hypervolumes with intervals (star compare)
"""
