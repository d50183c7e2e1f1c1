"""Speed, as ratios measured in one run, and the committed results under results/."""
