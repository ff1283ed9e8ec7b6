"""How the page looks: in light and dark, in a wide window and on a phone."""

from __future__ import annotations


# The colours of Okabe and Ito, as in the figures of `fastbert_hf.evaluation`, lighter where it is dark around them.
COLOURS_OF_PAGE = """
:root {
    --fb-1: #0072b2; --fb-2: #d55e00; --fb-3: #009e73; --fb-4: #b8669a; --fb-5: #b67e00; --fb-others: #8a94a3;
    --fb-sure: #009e73; --fb-unsure: #a3adba; --fb-line: #d9dee6; --fb-soft: #eef2f6; --fb-mark: #e6f1f8;
    --fb-ink: #1f2937; --fb-muted: #5b6675; --fb-card: #ffffff; --fb-on-colour: #ffffff;
}
.dark {
    --fb-1: #3a9ad9; --fb-2: #e8813a; --fb-3: #2bb58c; --fb-4: #cf86b3; --fb-5: #d6a032; --fb-others: #7b8696;
    --fb-sure: #2bb58c; --fb-unsure: #66717f; --fb-line: #333d4b; --fb-soft: #222c39; --fb-mark: #18304480;
    --fb-ink: #e6ebf2; --fb-muted: #9aa7b8; --fb-card: #151c27; --fb-on-colour: #0b1118;
}
"""

FRAME = """
.gradio-container { max-width: 1280px !important; margin: 0 auto !important; font-variant-numeric: tabular-nums; }
.gradio-container .html-container { padding: 0 !important; }
.gradio-container footer > .divider:first-child { display: none; }
.gradio-container input:checked { /* Gradio shows what is chosen as if it were not, while the mouse is above it. */
    background-color: var(--checkbox-background-color-selected) !important;
    border-color: var(--checkbox-border-color-selected) !important;
}
.gradio-container .gallery { padding: 1px; }
.dark .gradio-container { --color-accent: #3a9ad9; --link-text-color: #3a9ad9; }
.dark button[role="tab"].selected { color: #3a9ad9; }
.dark input[type="range"] { --neutral-200: var(--fb-line); }
.fb { color: var(--fb-ink); display: flex; flex-direction: column; gap: 14px; line-height: 1.35; }
.fb > * { min-width: 0; }
.fb b { font-weight: 700; color: inherit; }
.fb i, .fb em { font-style: normal; }
.fb u, .fb s { text-decoration: none; }
.fb small { color: var(--fb-muted); font-size: 12.5px; font-weight: 400; }
.fb p { margin: 0; color: var(--fb-muted); font-size: 13px; }
.fb h4 { margin: 0 0 10px; font-size: 16px; font-weight: 700; color: var(--fb-ink); }
.fb-card, .fb-tile { background: var(--fb-card); border: 1px solid var(--fb-line); border-radius: 12px; }
.fb-card { padding: 16px 18px; min-width: 0; }
.fb-notice {
    border: 1px dashed var(--fb-line); border-radius: 12px; padding: 40px 24px; color: var(--fb-muted);
    text-align: center; overflow-wrap: anywhere;
}
.fb-progress { align-items: center; border-style: solid; background: var(--fb-card); }
.fb-progress b { color: var(--fb-ink); font-size: 17px; }
.fb-progress span { width: min(100%, 420px); height: 10px; border-radius: 5px; background: var(--fb-soft); }
.fb-progress i { display: block; height: 100%; border-radius: 5px; background: var(--fb-1); }
.fb-title { gap: 2px; padding: 6px 2px 0; }
.fb-title h1 { margin: 0; font-size: 28px; font-weight: 700; letter-spacing: -0.01em; color: var(--fb-ink); }
.fb-title p { font-size: 16px; overflow-wrap: anywhere; }
.fb .fb-heading { font-size: 17px; }
.fb-heading b { color: var(--fb-ink); }
.fb-hint { margin: 0; color: var(--fb-muted); font-size: 13px; overflow-wrap: anywhere; }
.fb-hint summary { cursor: pointer; }
.fb-hint .fb-hint { padding: 4px 0 0 14px; }
"""

TILES = """
.fb-top { display: grid; grid-template-columns: minmax(0, 1.7fr) minmax(0, 1fr) minmax(0, 1fr); gap: 14px; }
.fb-answer { display: flex; flex-direction: column; justify-content: space-between; gap: 14px; }
.fb-label { display: flex; align-items: baseline; gap: 10px; min-width: 0; }
.fb-label span { width: 14px; height: 14px; border-radius: 4px; background: var(--c); flex: none; }
.fb-label b { font-size: 30px; line-height: 1.15; overflow-wrap: anywhere; }
.fb-label b.fb-long { font-size: 20px; }
.fb-label em { font-size: 20px; color: var(--fb-muted); white-space: nowrap; }
.fb-depth { display: flex; flex-direction: column; gap: 7px; font-size: 15px; }
.fb-steps { display: flex; gap: 4px; }
.fb-steps i { height: 8px; flex: 1; border-radius: 4px; background: var(--fb-line); }
.fb-steps i.fb-on { background: var(--fb-1); }
.fb-tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 14px; }
.fb-tile { padding: 12px 16px; display: flex; flex-direction: column; gap: 1px; }
.fb-top .fb-tile { justify-content: center; }
.fb-tile > span { font-size: 14px; color: var(--fb-muted); }
.fb-tile > b { font-size: 25px; line-height: 1.25; }
.fb-tile > b > i { font-size: 16px; font-weight: 400; color: var(--fb-muted); margin-left: 6px; }
"""

EXITS = """
.fb-exits { padding: 14px 0 12px; --name: 92px; }
.fb-members { --name: 124px; }
.fb-exits > p { padding: 10px 18px 0; }
.fb-caption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 4px 24px; padding: 0 18px 10px; }
.fb-caption h4 { margin: 0; }
.fb-head, .fb-exit {
    display: grid; grid-template-columns: var(--name) minmax(0, 1.25fr) minmax(0, 1fr); gap: 0 22px; padding: 0 18px;
}
.fb-head {
    padding-bottom: 6px; font-size: 13px; line-height: 1.2; color: var(--fb-muted); align-items: end;
    border-bottom: 1px solid var(--fb-line);
}
.fb-legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 13px; color: var(--fb-muted); }
.fb-legend span { display: inline-flex; align-items: baseline; gap: 6px; overflow-wrap: anywhere; }
.fb-legend span::before {
    content: ""; width: 9px; height: 9px; border-radius: 3px; background: var(--c); flex: none;
}
.fb-exit { align-items: center; min-height: 46px; }
.fb-exit .fb-name { padding: 4px 0; }
.fb-name { display: flex; flex-direction: column; font-size: 15px; line-height: 1.2; }
.fb-stack { display: flex; gap: 2px; height: 24px; border-radius: 6px; overflow: hidden; }
.fb-stack i {
    background: var(--c); color: var(--fb-on-colour); font-size: 13px; font-weight: 700; display: flex;
    align-items: center; justify-content: center; min-width: 0; white-space: nowrap; container-type: inline-size;
}
@container (max-width: 31px) { .fb-stack b { display: none; } }
.fb-meter {
    display: grid; grid-template-columns: minmax(0, 1fr) 32px; gap: 10px; align-items: center; align-self: stretch;
}
.fb-meter > b { font-size: 14px; text-align: right; }
.fb-track { position: relative; align-self: stretch; display: flex; align-items: center; }
.fb-track::before {
    content: ""; position: absolute; left: 0; right: 0; top: 50%; height: 8px; margin-top: -4px; border-radius: 4px;
    background: var(--fb-soft);
}
.fb-track i { position: relative; height: 8px; min-width: 3px; border-radius: 4px; background: var(--fb-unsure); }
.fb-sure .fb-track i { background: var(--fb-sure); }
.fb-track u { position: absolute; top: 0; bottom: 0; border-left: 1.5px dashed var(--fb-ink); z-index: 1; }
.fb-left { background: var(--fb-mark); box-shadow: inset 3px 0 0 var(--fb-1); }
.fb-left .fb-name small { color: var(--fb-1); font-weight: 700; }
.fb-not-run .fb-name b, .fb-not-run .fb-meter > b, .fb-not-asked .fb-meter > b { opacity: 0.4; }
.fb-not-run .fb-track i, .fb-not-asked .fb-track i { opacity: 0.35; }
.fb-not-run .fb-stack, .fb-not-asked .fb-stack { opacity: 0.3; }
"""

FIGURES = """
.fb-pair { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 14px; }
.fb-pair > .fb-card { display: flex; flex-direction: column; }
.fb-pair .fb-axis { text-align: center; }
.fb-bars {
    display: flex; align-items: stretch; gap: 10px; flex: 1; min-height: 230px; margin-bottom: 26px;
    border-bottom: 1px solid var(--fb-line);
}
.fb-bar {
    flex: 1; min-width: 0; display: flex; flex-direction: column; justify-content: flex-end; align-items: center;
    position: relative;
}
.fb-bar b { font-size: 13px; line-height: 22px; white-space: nowrap; }
.fb-bar i {
    width: 100%; max-width: 64px; background: var(--fb-1); border-radius: 5px 5px 0 0; flex: none;
    height: calc((100% - 22px) * var(--h));
}
.fb-bar span { position: absolute; top: 100%; font-size: 13px; color: var(--fb-muted); padding-top: 4px; }
.fb-dense { gap: 3px; }
.fb-dense b, .fb-dense span { font-size: 10px; }
.fb-plot { position: relative; height: 200px; margin: 14px 16px 48px 46px; }
.fb-plot svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.fb-plot polyline { fill: none; stroke-width: 2.2; vector-effect: non-scaling-stroke; stroke-linejoin: round; }
.fb-plot u { position: absolute; left: 0; right: 0; border-bottom: 1px solid var(--fb-line); }
.fb-plot u span {
    position: absolute; right: 100%; top: -9px; padding-right: 8px; font-size: 13px; color: var(--fb-muted);
    white-space: nowrap;
}
.fb-plot s { position: absolute; top: -8px; bottom: 0; border-left: 1.5px dashed var(--fb-ink); }
.fb-plot > i {
    position: absolute; width: 12px; height: 12px; margin: 0 0 -6px -6px; border-radius: 50%; background: var(--c);
    border: 2px solid var(--fb-card);
}
.fb-ticks span {
    position: absolute; top: calc(100% + 6px); transform: translateX(-50%); text-align: center; font-size: 13px;
    color: var(--fb-muted); display: flex; flex-direction: column;
}
.fb-ticks small { color: var(--fb-1); font-weight: 700; }
.fb-table > div { overflow-x: auto; margin: 0 -18px; padding: 0 18px; }
.fb-table table { border-collapse: collapse; width: 100%; font-size: 14px; }
.fb-table th, .fb-table td { border-bottom: 1px solid var(--fb-line); text-align: left; padding: 7px 14px 7px 0; }
.fb-table th { font-weight: 700; color: var(--fb-muted); padding-top: 2px; white-space: nowrap; }
.fb-table td { vertical-align: top; overflow-wrap: break-word; min-width: 52px; }
.fb-table tr:last-child td { border-bottom: 0; padding-bottom: 0; }
"""

PHONE = """
@media (max-width: 720px) {
    .gradio-container main.fillable { padding: 12px !important; }
    .fb-title h1 { font-size: 24px; }
    .fb-pair { grid-template-columns: minmax(0, 1fr); }
    .fb-card { padding: 14px; }
    .fb-top { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 10px; }
    .fb-answer { grid-column: 1 / -1; }
    .fb-tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 10px; }
    .fb-tile { padding: 10px 12px; }
    .fb-tiles > :last-child:nth-child(odd) { grid-column: 1 / -1; }
    .fb-tile > b { font-size: 22px; }
    .fb-label b { font-size: 26px; }
    .fb-exits { padding: 12px 0; --name: 68px; }
    .fb-members { --name: 78px; }
    .fb-caption { padding: 0 12px 8px; }
    .fb-exits > p { padding: 10px 12px 0; }
    .fb-head, .fb-exit { gap: 0 12px; padding: 0 12px; }
    .fb-stack i { font-size: 12px; }
    .fb-meter { gap: 6px; }
    .fb-bars { gap: 6px; }
    .fb-table > div { margin: 0; padding: 0; }
    .fb-table thead { display: none; }
    .fb-table tr { display: block; padding: 9px 0; border-top: 1px solid var(--fb-line); }
    .fb-table td, .fb-table tr:last-child td {
        display: inline-block; min-width: 0; max-width: 100%; padding: 1px 14px 1px 0; border: 0;
        overflow-wrap: anywhere;
    }
    .fb-table td::before { content: attr(data-name) " "; color: var(--fb-muted); font-size: 13px; }
}
"""

CSS = COLOURS_OF_PAGE + FRAME + TILES + EXITS + FIGURES + PHONE
