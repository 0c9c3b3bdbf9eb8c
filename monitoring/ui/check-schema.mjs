// Type-checks the dashboard's JSON against @grafana/schema: the dashboard, and each panel's options and field settings by its type.
//
//   npm install && npm run schema
//
// Limits: the schema package has no type for Prometheus's queries, so targets are checked as far as DataQuery goes.
import { execFileSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const here = dirname(fileURLToPath(import.meta.url));
const dashboard = JSON.parse(readFileSync(join(here, "../grafana/dashboards/vllm-dflash.json"), "utf8"));
const files = { timeseries: "TimeSeries", stat: "Stat", bargauge: "BarGauge", heatmap: "Heatmap" };
const composable = (type, name) => `import("@grafana/schema/dist/esm/raw/composable/${type}/panelcfg/x/${files[type]}PanelCfg_types.gen").${name}`;
const withFieldConfig = new Set(["timeseries", "heatmap"]);

const lines = [
  'import type { Dashboard, DataQuery } from "@grafana/schema";',
  // A literal of a JSON file is no member of an enum for tsc: enums of strings are read as their values.
  "type Json<T> = T extends string ? `${T}` : T extends number | boolean | null | undefined ? T : T extends (infer U)[] ? Json<U>[]",
  "  : T extends object ? { [K in keyof T]: Json<T[K]> } : T;",
  `export const dashboard: Json<Dashboard> = ${JSON.stringify(dashboard)};`,
];
dashboard.panels.filter((panel) => panel.type !== "row" && panel.type !== "text").forEach((panel, i) => {
  // Options are partial in a file: the panel fills in its defaults.
  lines.push(`export const options${i}: Partial<Json<${composable(panel.type, "Options")}>> = ${JSON.stringify(panel.options)};`);
  lines.push(`export const targets${i}: Json<DataQuery & { expr: string; legendFormat?: string; instant?: boolean; range?: boolean; format?: string }>[]`
    + ` = ${JSON.stringify(panel.targets)};`);
  if (withFieldConfig.has(panel.type) && panel.fieldConfig.defaults.custom) {
    lines.push(`export const custom${i}: Partial<Json<${composable(panel.type, "FieldConfig")}>> = ${JSON.stringify(panel.fieldConfig.defaults.custom)};`);
  }
});

const folder = mkdtempSync(join(here, "schema-"));
try {
  const file = join(folder, "dashboard.ts");
  writeFileSync(file, lines.join("\n"));
  const flags = ["--noEmit", "--strict", "--skipLibCheck", "--moduleResolution", "bundler", "--module", "esnext", "--target", "es2022"];
  execFileSync(join(here, "node_modules/.bin/tsc"), [...flags, file], { stdio: "inherit" });
  console.log(`${lines.length - 4} declarations type-check against @grafana/schema`);
} catch (error) {
  process.exitCode = error.status ?? 1;
} finally {
  rmSync(folder, { recursive: true });
}
