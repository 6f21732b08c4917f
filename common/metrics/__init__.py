"""Pure metrics: of a ranking against judgments (`ranking`), and of passages against answers (`answers`)."""
