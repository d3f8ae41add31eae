"""The colours of plots and pages: the Okabe-Ito palette, which is safe for colour blindness."""

from __future__ import annotations

BLUE, ORANGE, GREEN, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PURPLE, YELLOW = "#56B4E9", "#CC79A7", "#F0E442"
BROWN, GREY = "#7A5230", "#A8A8A8"
INK, MUTED, FAINT = "#222222", "#5F5F5F", "#C8C8C8"
CYCLE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, INK, MUTED)
