"""The report's style sheet: part of the page, so that it needs no other file."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --ground: #f5f5f2; --surface: #fff; --ink: #1b1f24; --muted: #59616b; --line: #d9dce0; --faint: #eceef0;
  --accent: #2a5bd7; --on-accent: #fff; --warm: #b4451f;
  --c0: #2a5bd7; --c1: #b4451f; --c2: #1d7a55; --c3: #8b3a8f; --c4: #8a6a00; --c5: #0f7389;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #131519; --surface: #1b1e24; --ink: #e7e9ec; --muted: #a2aab5; --line: #323841; --faint: #262b32;
    --accent: #8db1ff; --on-accent: #10203f; --warm: #ffa07f;
    --c0: #8db1ff; --c1: #ffa07f; --c2: #74d3a8; --c3: #dd9be0; --c4: #e3c260; --c5: #70cbe0;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; display: grid; gap: 1.25rem;
  grid-template-columns: minmax(0, 1fr); }
h1 { font-size: 1.625rem; line-height: 1.25; letter-spacing: -.015em; margin: 0 0 .375rem; overflow-wrap: anywhere; }
h2 { font-size: 1.125rem; letter-spacing: -.01em; margin: 0 0 .25rem; }
h3 { font-size: .875rem; margin: 1.25rem 0 .375rem; }
p { margin: 0; overflow-wrap: anywhere; }
section, header { background: var(--surface); border: 1px solid var(--line); border-radius: .75rem; padding: 1.25rem;
  min-width: 0; }
.note { color: var(--muted); font-size: .875rem; max-width: 46rem; margin-bottom: 1rem; }
.scroll + .note, .pair + .note, .note + .note { margin-top: .75rem; }
code { font: .875em/1.4 ui-monospace, "DejaVu Sans Mono", monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
pre { margin: .75rem 0 0; overflow-x: auto; font: .8125rem/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
summary { cursor: pointer; font-size: .875rem; color: var(--accent); margin-top: 1rem; }
.facts { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .25rem 1.25rem; margin: 0;
  font-size: .9375rem; }
.facts dt { color: var(--muted); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.hero { display: grid; gap: 1rem 2.5rem; grid-template-columns: minmax(0, 1fr); margin-top: 1.25rem; }
.figure { font-size: 3.25rem; line-height: 1; font-weight: 650; letter-spacing: -.03em; color: var(--accent);
  font-variant-numeric: tabular-nums; }
.figure + p { margin: .5rem 0 .25rem; font-weight: 600; }
.pair + .scroll { margin-top: 1rem; }
.pair { display: grid; gap: 1.5rem 2rem; grid-template-columns: minmax(0, 1fr); align-items: start; }
.pair > div { min-width: 0; }
@media (min-width: 52rem) {
  .pair { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .hero { grid-template-columns: minmax(0, 5fr) minmax(0, 6fr); }
  section, header { padding: 1.5rem 1.75rem; }
}
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; width: 100%; }
th, td { text-align: left; font-weight: 400; padding: .4375rem 1rem .4375rem 0; border-bottom: 1px solid var(--faint);
  vertical-align: top; }
th:last-child, td:last-child { padding-right: 0; }
thead th { color: var(--muted); font-size: .8125rem; border-color: var(--line); vertical-align: bottom; }
tbody tr:last-child > * { border-bottom: 0; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
small { color: var(--muted); font-size: .8125rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.wide { overflow-wrap: anywhere; min-width: 12rem; }
.number + td, .number + th { padding-left: .75rem; }
.first th { font-weight: 650; }
.first tbody tr:first-child > * { font-weight: 650; }
.heat { width: auto; border-spacing: 2px; border-collapse: separate; }
.heat th, .heat td { border: 0; padding: .375rem .625rem; }
.heat tbody th { max-width: 14rem; min-width: 6rem; overflow-wrap: break-word; padding-left: 0;
  position: sticky; left: 0; background: var(--surface); }
.heat thead th { text-align: center; max-width: 9rem; overflow-wrap: break-word; }
.heat td { text-align: center; min-width: 2.5rem; border-radius: .25rem; font-variant-numeric: tabular-nums;
  vertical-align: middle; background: color-mix(in srgb, var(--accent) var(--share), var(--faint)); }
.heat td.wrong { background: color-mix(in srgb, var(--warm) var(--share), var(--faint)); }
.heat td.hot { color: var(--surface); }
.near { display: flex; gap: .375rem; align-items: baseline; white-space: nowrap; margin-right: .75rem; }
.near code { background: var(--faint); border-radius: .25rem; padding: 0 .3125rem; white-space: pre; max-width: 12rem;
  overflow: hidden; text-overflow: ellipsis; }
.chart { display: block; width: 100%; max-width: 34rem; height: auto; font: 12px system-ui, sans-serif; }
.chart text { fill: var(--muted); }
.chart .title { fill: var(--ink); }
.chart .name { fill: var(--ink); }
.chart .name.strong { font-weight: 650; }
.grid { stroke: var(--faint); }
.axis { stroke: var(--line); }
path { fill: none; stroke-linejoin: round; stroke-linecap: round; }
path.strong { stroke: var(--accent); stroke-width: 2.25; }
path.thin { stroke: var(--muted); stroke-width: 1; opacity: .55; }
path.faint { stroke: var(--accent); stroke-width: 1; opacity: .3; }
.reference { stroke: var(--muted); stroke-dasharray: 4 4; }
.gap { stroke: var(--warm); stroke-width: 2; opacity: .6; }
.dot { fill: var(--muted); }
.dot.strong { fill: var(--accent); }
.dot.soft { fill-opacity: .75; stroke: var(--surface); }
.whisker { stroke: var(--muted); stroke-width: 2.5; opacity: .7; stroke-linecap: round; }
.whisker.strong { stroke: var(--accent); opacity: 1; }
.range { stroke: var(--ink); stroke-width: 1.25; opacity: .6; }
.bar { fill: var(--accent); } .bar.less { fill: var(--warm); }
.dot.colour0 { fill: var(--c0); } .dot.colour1 { fill: var(--c1); } .dot.colour2 { fill: var(--c2); }
.dot.colour3 { fill: var(--c3); } .dot.colour4 { fill: var(--c4); } .dot.colour5 { fill: var(--c5); }
.legend { list-style: none; margin: .25rem 0 0; padding: 0; display: flex; flex-wrap: wrap; gap: .125rem 1.25rem;
  font-size: .8125rem; color: var(--muted); }
.key { display: inline-block; width: .625rem; height: .625rem; border-radius: 50%; margin-right: .375rem; }
.key.colour0 { background: var(--c0); } .key.colour1 { background: var(--c1); } .key.colour2 { background: var(--c2); }
.key.colour3 { background: var(--c3); } .key.colour4 { background: var(--c4); } .key.colour5 { background: var(--c5); }
.key.strong, .key.thin, .key.faint { width: 1.25rem; height: 0; border-radius: 0; vertical-align: middle;
  border-top: 2.25px solid var(--accent); }
.key.thin { border-top: 1px solid var(--muted); } .key.faint { border-top-width: 1px; opacity: .4; }
@media (max-width: 45rem) {
  .facts { grid-template-columns: minmax(0, 1fr); gap: 0; }
  .facts dd { margin-bottom: .5rem; }
  .chart { font-size: 14px; }
  .heat tbody th { max-width: 8rem; }
  .stack thead { display: none; }
  .stack, .stack tbody, .stack th, .stack td { display: block; }
  .stack tr { display: flex; flex-wrap: wrap; gap: .375rem 1.25rem; padding: .75rem 0;
    border-bottom: 1px solid var(--line); }
  .stack tr:last-child { border-bottom: 0; padding-bottom: 0; }
  .stack th, .stack td { border: 0; padding: 0; text-align: left; white-space: normal; min-width: 0; }
  .near { display: inline-flex; }
  .stack td:empty { display: none !important; }
  .stack th, .stack td.wide { flex: 1 0 100%; }
  .stack th { overflow-wrap: anywhere; font-weight: 650; }
  .stack td::before, .stack th::before { content: attr(data-title); display: block; color: var(--muted);
    font-size: .75rem; font-weight: 400; }
}
@media print { body { background: none; } section, header { break-inside: avoid; border: 0; padding: 0; } }
"""
