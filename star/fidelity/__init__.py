"""How far the order in which a search put its candidates can be believed: its certificate.

A sample of the candidates is trained again, for longer and from several seeds, and the orders are compared.

statistics.py   rank correlation, bootstrap intervals, the probability of being non-dominated
settings.py     how many candidates, how long, how often
sample.py       which candidates
record.py       the trainings that are done (fidelity.jsonl)
checksum.py     that neither file was changed since
device.py       how far off its predictions for a device are
retrain.py      what a worker does
certificate.py  what the trainings say
document.py     the certificate as a file (fidelity.json)
run.py          all of it, for a run directory
"""
