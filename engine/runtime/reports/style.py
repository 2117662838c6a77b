"""The style sheet of the reports: calm, readable in light and dark, and on paper."""

STYLE = """
:root {
  --bg: #f6f7f9; --card: #fff; --ink: #1c2430; --quiet: #667085; --line: #e4e7ec; --accent: #2f6fde;
  --good: #15803d; --bad: #c0362c; --warn: #b45309;
  --c0: #2f6fde; --c1: #e07b39; --c2: #2a9d74; --c3: #8b5cd6; --c4: #c9447a; --c5: #7a8699;
}
@media (prefers-color-scheme: dark) { :root {
  --bg: #12161d; --card: #1a2029; --ink: #e6eaf0; --quiet: #94a0b3; --line: #2b3442; --accent: #6ea3ff;
  --good: #4ade80; --bad: #f87171; --warn: #fbbf24;
  --c0: #6ea3ff; --c1: #f0a06a; --c2: #4cc79a; --c3: #b494f0; --c4: #ec7fa9; --c5: #94a0b3;
} }
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--bg); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main { max-width: 1180px; margin: 0 auto; padding: 32px 20px 64px; }
header { margin-bottom: 24px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -.01em; }
h2 { font-size: 18px; margin: 36px 0 10px; }
h3 { font-size: 14px; margin: 0 0 10px; font-weight: 600; }
p { margin: 6px 0; }
.quiet { color: var(--quiet); font-size: 13px; margin: 6px 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 14px 0; }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.tile .label, .tile .note { color: var(--quiet); font-size: 12.5px; }
.tile .note { min-height: 1em; overflow-wrap: anywhere; }
.tile .value {
  font-size: 24px; font-weight: 650; letter-spacing: -.01em; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere;
}
.tile.good { border-left: 4px solid var(--good); } .tile.good .value { color: var(--good); }
.tile.bad { border-left: 4px solid var(--bad); } .tile.bad .value { color: var(--bad); }
.tile.warn { border-left: 4px solid var(--warn); } .tile.warn .value { color: var(--warn); }
.row {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 14px; margin: 14px 0;
}
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th {
  text-align: left; color: var(--quiet); font-weight: 500; padding: 6px 10px; border-bottom: 1px solid var(--line);
  white-space: nowrap;
}
td { padding: 6px 10px; border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; }
td.num, th.num { text-align: right; }
td.long { min-width: 17em; }
td.short { white-space: nowrap; }
a { color: var(--accent); }
.badge { color: var(--quiet); white-space: nowrap; }
.badge::before { content: "\\25cf"; margin-right: 5px; }
.badge.good { color: var(--good); } .badge.bad { color: var(--bad); } .badge.warn { color: var(--warn); }
details { margin: 8px 0; }
summary { cursor: pointer; padding: 6px 0; font-size: 14px; font-weight: 600; }
.bar { position: relative; min-width: 90px; }
.bar i {
  position: absolute; inset: 2px auto 2px 0; background: var(--accent); opacity: .18; border-radius: 3px;
}
.bar span { position: relative; padding-left: 6px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 16px; margin: 0; font-size: 13.5px; }
dt { color: var(--quiet); }
dd { margin: 0; overflow-wrap: anywhere; }
svg { width: 100%; height: auto; display: block; }
.legend {
  display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 12.5px; color: var(--quiet); margin-bottom: 4px;
}
.legend i {
  display: inline-block; width: 16px; height: 3px; border-radius: 2px; margin-right: 6px; vertical-align: middle;
}
.legend i.fill { height: 10px; width: 10px; }
.grid { stroke: var(--line); }
.base { stroke: var(--quiet); }
.rule { stroke: var(--quiet); stroke-dasharray: 4 4; }
.tick { font-size: 11px; fill: var(--quiet); }
.axis { font-size: 12px; fill: var(--quiet); }
table.heat td {
  text-align: center; padding: 5px 6px; border: 1px solid var(--bg);
  background: color-mix(in srgb, var(--c0) calc(.7 * var(--share)), transparent); /* the number stays readable */
}
table.heat thead th { font-size: 12px; padding: 6px; text-align: center; white-space: normal; }
table.heat td.gap {
  background: repeating-linear-gradient(45deg, transparent, transparent 4px, var(--line) 4px, var(--line) 6px);
}
table.heat tbody th { border: 0; }
footer { margin-top: 40px; color: var(--quiet); font-size: 12.5px; overflow-wrap: anywhere; }
@media print { body { background: #fff; } .card, .tile { break-inside: avoid; } }
"""
