// The dashboard's panels by Grafana's own UI components (TimeSeries, BigValue, BarGauge, PanelChrome), from what collect.py wrote.
// Heat maps are no part of @grafana/ui: theirs is a grid of this file, each column of cells a time.
import "uplot/dist/uPlot.min.css";
import { createRoot } from "react-dom/client";
import { createTheme, EventBusSrv, FieldColorModeId, FieldType, getDisplayProcessor, ThemeContext, ThresholdsMode, toDataFrame, dateTime, LoadingState } from "@grafana/data";
import { BarGauge, BigValue, BigValueColorMode, BigValueGraphMode, BigValueJustifyMode, BigValueTextMode, GlobalStyles, PanelChrome, PanelContextProvider, PortalContainer, TimeSeries } from "@grafana/ui";
import { BarGaugeDisplayMode, BarGaugeNamePlacement, BarGaugeValueMode, LegendDisplayMode, VizOrientation } from "@grafana/schema";

const data = (window as any).DATA;
const theme = createTheme({ colors: { mode: "light" } });
const COLUMN = 50, ROW_HEIGHT = 34, GAP = 8;
const from = dateTime(data.start), to = dateTime(data.end);
const timeRange = { from, to, raw: { from, to } };

function frames(panel: any, series: any[]) {
  const defaults = panel.fieldConfig.defaults;
  return series.map((one, i) => {
    const color = theme.visualization.getColorByName(theme.visualization.palette[i % theme.visualization.palette.length]);
    const config = { ...defaults, displayName: one.name, color: { mode: FieldColorModeId.Fixed, fixedColor: color },
      thresholds: defaults.thresholds ?? { mode: ThresholdsMode.Absolute, steps: [{ value: -Infinity, color: "green" }] } };
    const frame = toDataFrame({ fields: [
      { name: "time", type: FieldType.time, values: one.points.map((p: number[]) => p[0]) },
      { name: one.name, type: FieldType.number, values: one.points.map((p: number[]) => p[1]), config },
    ] });
    frame.fields.forEach((field) => { field.display = getDisplayProcessor({ field, theme, timeZone: "utc" }); });
    return frame;
  });
}

const last = (one: any) => one.points[one.points.length - 1]?.[1];
function thresholdColor(panel: any, value: number) {
  const steps = panel.fieldConfig.defaults.thresholds?.steps ?? [{ value: null, color: "green" }];
  const step = steps.filter((s: any) => s.value === null || value >= s.value).pop();
  return theme.visualization.getColorByName(step.color);
}

function stat(panel: any, series: any[], width: number, height: number) {
  const [frame] = frames(panel, series.slice(0, 1));
  const shown = frame.fields[1].display!(last(series[0]));
  const color = thresholdColor(panel, last(series[0]));
  const values = frame.fields[1].values as number[], min = Math.min(0, ...values), max = Math.max(...values);
  frame.fields[1].state = { range: { min, max, delta: max - min } };
  const name = panel.options.textMode === "name";
  return <BigValue theme={theme} width={width} height={height} colorMode={BigValueColorMode.Value}
    graphMode={panel.options.graphMode === "area" ? BigValueGraphMode.Area : BigValueGraphMode.None}
    justifyMode={BigValueJustifyMode.Auto} textMode={name ? BigValueTextMode.Name : BigValueTextMode.Value}
    sparkline={panel.options.graphMode === "area" ? { y: { ...frame.fields[1], config: { ...frame.fields[1].config, color: { mode: FieldColorModeId.Fixed, fixedColor: color } } }, x: frame.fields[0] } : undefined}
    value={{ ...shown, color, title: series[0].name }} />;
}

function bars(panel: any, series: any[], width: number, height: number) {
  const each = height / series.length;
  return <div>{frames(panel, series).map((frame, i) => <div key={i} style={{ height: each }}>
    <BarGauge theme={theme} width={width} height={each - 4} orientation={VizOrientation.Horizontal} field={frame.fields[1].config} display={frame.fields[1].display!}
      value={{ ...frame.fields[1].display!(last(series[i])), title: series[i].name, color: thresholdColor(panel, last(series[i])) }}
      displayMode={BarGaugeDisplayMode.Basic} valueDisplayMode={BarGaugeValueMode.Text} namePlacement={BarGaugeNamePlacement.Left} itemSpacing={4} showUnfilled /></div>)}</div>;
}

function heat(panel: any, series: any[], width: number, height: number) {
  const at = new Map<number, number[]>();
  series.forEach((one, row) => one.points.forEach(([time, value]: number[]) => { (at.get(time) ?? at.set(time, []).get(time))![row] = value; }));
  const cells: any[] = [];
  let most = 0;
  at.forEach((cumulative, time) => cumulative.forEach((value, row) => { const here = Math.max(0, value - (row ? cumulative[row - 1] ?? 0 : 0)); most = Math.max(most, here); cells.push([time, row, here]); }));
  const left = 44, w = (width - left) * 1.02 / Math.max(60, at.size), h = height / series.length;
  return <svg width={width} height={height}>
    {cells.filter((c) => c[2] > 0).map(([time, row, value], i) => <rect key={i} x={left + (time - data.start) / (data.end - data.start) * (width - left)} y={height - (row + 1) * h}
      width={w} height={h - 1} fill={`rgba(31,96,196,${0.08 + 0.92 * value / most})`} />)}
    {series.map((one, row) => <text key={row} x={left - 6} y={height - row * h - h / 2 + 3} fontSize={9} textAnchor="end" fill={theme.colors.text.secondary}>{Number(one.name) === Infinity || one.name === "+Inf" ? "more" : Number(one.name)}</text>)}
  </svg>;
}

function lines(panel: any, series: any[], width: number, height: number) {
  return <TimeSeries frames={frames(panel, series)} timeRange={timeRange as any} timeZone="utc" width={width} height={height}
    legend={{ displayMode: LegendDisplayMode.List, placement: "bottom", showLegend: true, calcs: [] } as any} structureRev={1} />;
}

const DRAW: Record<string, typeof lines> = { timeseries: lines, stat, bargauge: bars, heatmap: heat };
function Shown({ one, top }: any) {
  const at = one.panel.gridPos;
  const width = at.w * COLUMN - GAP, height = at.h * ROW_HEIGHT - GAP;
  return <div id={`panel-${one.panel.title}`} style={{ position: "absolute", left: at.x * COLUMN, top: (at.y - top) * ROW_HEIGHT, width, height }}>
    <PanelChrome title={one.panel.title} description={one.panel.description} width={width} height={height} loadingState={LoadingState.Done}>
      {(w: number, h: number) => one.series.length ? DRAW[one.panel.type](one.panel, one.series, w, h)
        : <div style={{ padding: 16, color: theme.colors.text.secondary }}>{one.panel.fieldConfig.defaults.noValue ?? "No data"}</div>}
    </PanelChrome></div>;
}

const rows = [...new Set(data.panels.map((one: any) => one.row))] as string[];
createRoot(document.getElementById("root")!).render(
  <ThemeContext.Provider value={theme}><GlobalStyles /><PanelContextProvider value={{ eventsScope: "global", eventBus: new EventBusSrv() } as any}>
    {rows.map((row) => {
      const own = data.panels.filter((one: any) => one.row === row);
      const top = Math.min(...own.map((one: any) => one.panel.gridPos.y));
      const bottom = Math.max(...own.map((one: any) => one.panel.gridPos.y + one.panel.gridPos.h));
      return <div key={row} className="drawn" data-row={row} style={{ width: 24 * COLUMN + 16, background: theme.colors.background.canvas, padding: 12 }}>
        <h4 style={{ margin: "0 0 8px" }}>{row}</h4>
        <div style={{ position: "relative", height: (bottom - top) * ROW_HEIGHT }}>{own.map((one: any) => <Shown key={one.panel.title} one={one} top={top} />)}</div></div>;
    })}<PortalContainer />
  </PanelContextProvider></ThemeContext.Provider>,
);
