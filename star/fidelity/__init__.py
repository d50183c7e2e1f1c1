"""How far the ranking of a search can be believed: its certificate.

statistics.py   rank correlation, bootstrap intervals, the probability of being non-dominated
"""
