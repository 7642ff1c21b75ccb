// Grafana's own types for what its files have: what is no field of theirs, or no value, does not compile.
import type * as grafana from "@grafana/schema";
import type { FieldConfig as TimeSeriesField, Options as TimeSeries } from "@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen";
import type { Options as Stat } from "@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen";
import type { FieldConfig as StateField, Options as StateTimeline } from "@grafana/schema/dist/esm/raw/composable/statetimeline/panelcfg/x/StateTimelinePanelCfg_types.gen";
import type { FieldConfig as TableField, Options as Table } from "@grafana/schema/dist/esm/raw/composable/table/panelcfg/x/TablePanelCfg_types.gen";
import type { Options as BarGauge } from "@grafana/schema/dist/esm/raw/composable/bargauge/panelcfg/x/BarGaugePanelCfg_types.gen";
import type { FieldConfig as HeatmapField, Options as Heatmap } from "@grafana/schema/dist/esm/raw/composable/heatmap/panelcfg/x/HeatmapPanelCfg_types.gen";
import type { Options as Text } from "@grafana/schema/dist/esm/raw/composable/text/panelcfg/x/TextPanelCfg_types.gen";

/** As JSON has it: the words of an enum. Everything has a default. */
type Plain<T> = unknown extends T ? T
  : T extends string ? (string extends T ? string : `${T}`)
  : T extends number | boolean | null | undefined ? T
  : T extends (infer One)[] ? Plain<One>[]
  : { [Key in keyof T]?: Plain<T[Key]> };

type Of<Type extends string, Options, Field = Record<string, never>> = Omit<grafana.Panel, "type" | "options" | "fieldConfig" | "targets"> & {
  type: Type; options?: Options; targets?: Query[];
  fieldConfig?: { defaults: Omit<grafana.FieldConfig, "custom"> & { custom?: Field }; overrides?: grafana.FieldConfigSource["overrides"] };
};
// The package has no queries of Prometheus's.
type Query = { refId: string; expr: string; instant?: boolean; range?: boolean; legendFormat?: string; format?: "table" | "time_series" | "heatmap"; interval?: string;
  editorMode?: "code" | "builder"; exemplar?: boolean; datasource?: grafana.DataSourceRef };
// What Prometheus's own plugin reads of an annotation; what it shows of a variable, and what the SDK
// writes of every one, as of an interval; and what tables have in older Grafanas.
type Annotation = grafana.AnnotationQuery<Query & grafana.DataQuery> & { expr: string; step: string; titleFormat: string; textFormat: string; tagKeys: string };
type Variable = grafana.VariableModel & { auto?: boolean; auto_count?: number; auto_min?: string; definition?: string };
type OldTable = Table & { footer?: { countRows: boolean; reducer: string[]; show: boolean } };
type Panel = Of<"timeseries", TimeSeries, TimeSeriesField> | Of<"stat", Stat> | Of<"state-timeline", StateTimeline, StateField> | Of<"table", OldTable, TableField>
  | Of<"bargauge", BarGauge> | Of<"heatmap", Heatmap, HeatmapField> | Of<"text", Text>;
type Row = Omit<grafana.RowPanel, "panels"> & { panels: Panel[] };

export type Board = Plain<
  Omit<grafana.Dashboard, "panels" | "annotations" | "templating"> & { panels: (Panel | Row)[]; annotations: { list: Annotation[] }; templating: { list: Variable[] } }
>;
