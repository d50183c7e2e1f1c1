"""The style sheet of the report: one file, no fonts or pictures from elsewhere, light and dark, any width."""

__all__ = ["CSS"]

CSS = """
:root {
  color-scheme: light dark;
  --page: #fefefe; --panel: #f6f8fa; --ink: #1c2530; --muted: #64707d; --line: #dde3e9; --soft: #b4bfcb;
  --accent: #1f6feb; --warm: #c2410c; --good: #0f7a5a; --good-panel: #e7f5ef; --warm-panel: #fdf0e8;
  --group-1: #1f4e9c; --group-2: #b3361b; --group-3: #0f7a5a; --group-4: #7b3fa0; --group-5: #8a6a00;
  --group-6: #b0276f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #10151b; --panel: #182029; --ink: #e4e9ef; --muted: #97a3b0; --line: #2a343f; --soft: #55626f;
    --accent: #6ea8ff; --warm: #ff9d66; --good: #5ed1a6; --good-panel: #12291f; --warm-panel: #2d1d12;
    --group-1: #7fb0ff; --group-2: #ff8f75; --group-3: #5ed1a6; --group-4: #c79aec; --group-5: #e0bd52;
    --group-6: #ff8cc0;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 2.2rem 1.2rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0; letter-spacing: -0.02em; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 3.2rem 0 0.3rem; letter-spacing: -0.01em; }
h3 { font-size: 1rem; margin: 0 0 0.2rem; }
p { margin: 0.4rem 0; }
a { color: var(--accent); }
.lead { color: var(--muted); max-width: 46rem; margin: 0.3rem 0 0; overflow-wrap: anywhere; }
code, pre { font: 0.86em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
code { overflow-wrap: anywhere; }
.command {
  background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 0.6rem 0.8rem;
  overflow-x: auto; margin: 0.6rem 0; white-space: pre;
}
.cards {
  display: grid; gap: 0.8rem; grid-template-columns: repeat(auto-fit, minmax(148px, 1fr)); margin: 1.6rem 0 0;
}
.card { background: var(--panel); border: 1px solid var(--line); border-radius: 12px; padding: 0.8rem 1rem; }
.card b { display: block; font-size: 1.5rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.card span { color: var(--muted); font-size: 0.86rem; }
.verdicts { list-style: none; padding: 0; margin: 1.2rem 0 0; display: grid; gap: 0.5rem; }
.verdicts li {
  border-radius: 10px; padding: 0.65rem 0.9rem; border: 1px solid var(--line); background: var(--panel);
  border-left: 4px solid var(--soft);
}
.verdicts .good { border-left-color: var(--good); background: var(--good-panel); }
.verdicts .bad { border-left-color: var(--warm); background: var(--warm-panel); }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); }
figure {
  margin: 1rem 0 0; border: 1px solid var(--line); border-radius: 12px; padding: 1rem 1rem 0.9rem;
  min-width: 0;
}
.grid, .backbones { margin-top: 1rem; }
.grid figure, .backbones figure { margin: 0; }
figure svg { display: block; width: 100%; height: auto; margin: 0.3rem 0; }
svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif !important; }
figcaption { color: var(--muted); font-size: 0.86rem; line-height: 1.45; }
.wide { overflow-x: auto; margin: 1rem 0 0; border: 1px solid var(--line); border-radius: 12px; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td {
  text-align: left; padding: 0.45rem 0.8rem; border-bottom: 1px solid var(--line);
  vertical-align: middle;
}
tr:last-child > * { border-bottom: 0; }
thead th { color: var(--muted); font-weight: 600; white-space: nowrap; background: var(--panel); }
td.number, th.number { text-align: right; white-space: nowrap; }
tr.reference td { font-style: italic; }
tr.reference td .strip { font-style: normal; }
td small { color: var(--muted); display: block; }
.better { color: var(--good); } .worse { color: var(--warm); }
.strip { display: inline-flex; gap: 2px; vertical-align: middle; }
.strip i { width: 9px; height: 18px; border-radius: 2px; display: block; flex: none; }
.legend {
  display: flex; flex-wrap: wrap; gap: 0.3rem 1.1rem; color: var(--muted); font-size: 0.86rem;
  margin: 0.7rem 0;
}
.legend i { width: 10px; height: 10px; border-radius: 3px; display: inline-block; margin-right: 0.4rem; }
.backbones {
  display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr));
}
.backbone:target { border-color: var(--accent); box-shadow: 0 0 0 2px var(--accent); }
.backbone .numbers { color: var(--muted); font-size: 0.86rem; margin: 0; }
.genome { color: var(--muted); font-size: 0.72rem; line-height: 1.4; overflow-wrap: anywhere; }
dl {
  display: grid; grid-template-columns: minmax(9rem, max-content) 1fr; gap: 0.25rem 1.2rem;
  font-size: 0.92rem;
}
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; min-width: 0; }
details { border: 1px solid var(--line); border-radius: 12px; padding: 0.7rem 1rem; margin: 0.8rem 0 0; }
summary { cursor: pointer; font-weight: 600; }
footer {
  color: var(--muted); font-size: 0.86rem; margin-top: 3rem; border-top: 1px solid var(--line);
  padding-top: 1rem;
}
@media (max-width: 560px) {
  main { padding: 1.4rem 0.9rem 3rem; }
  h1 { font-size: 1.5rem; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: 0.5rem; }
  figure { padding: 0.8rem 0.6rem; }
  .strip i { width: 6px; }
}
@media print { main { max-width: none; } figure, .card, .verdicts li { break-inside: avoid; } }
"""
