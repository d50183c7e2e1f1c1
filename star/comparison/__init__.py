"""Search algorithms compared over a table of genomes that were trained once.

table       the file of evaluated genomes (star table)
surrogate   what a trained objective would be for a genome that the table does not hold
replay      the algorithms over table and surrogate, their hypervolumes with intervals (star compare)
"""
