"""What each LIV takes on a device at the target size, measured once, and what a genome takes by adding up.

table.py    the table and its file
livs.py     measures it
predict.py  from the table to any genome
cached.py   where tables are kept
"""

from star.profile.table import ProfileDamaged, ProfileTable, read_table

__all__ = ["ProfileDamaged", "ProfileTable", "read_table"]
