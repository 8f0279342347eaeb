//! What `--json` prints is what `docs/schema.json` says, for every verb whose schema is there.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use nwfilter_testlab::{Host, Need, skip_unless};
use serde_json::{Value, json};
use tempfile::TempDir;

/// JSON Schema, as much of it as is used; a keyword that is not known here is an error of the schema.
struct Schema(Value);

impl Schema {
    fn read() -> Self {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/schema.json");
        Self(serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap())
    }

    fn verbs(&self) -> BTreeSet<String> {
        self.0["$defs"].as_object().unwrap().keys().cloned().collect()
    }

    fn of(&self, name: &str) -> &Value {
        self.0["$defs"].get(name).unwrap_or_else(|| panic!("no $defs/{name}"))
    }

    /// What does not fit, and where.
    fn check(&self, schema: &Value, value: &Value, place: &str) -> Result<(), String> {
        let wrong = |why: String| Err(format!("{place}: {why}: {value}"));
        for (keyword, wanted) in schema.as_object().unwrap() {
            match keyword.as_str() {
                "description" => (),
                "$ref" => {
                    let name = wanted.as_str().unwrap().strip_prefix("#/$defs/").unwrap();
                    self.check(self.of(name), value, place)?;
                }
                "type" if !has_type(value, wanted.as_str().unwrap()) => return wrong(format!("no {wanted}")),
                "type" => (),
                "minimum" if value.as_i64() < wanted.as_i64() => return wrong(format!("below {wanted}")),
                "minimum" => (),
                "enum" if !wanted.as_array().unwrap().contains(value) => {
                    return wrong(format!("not in {wanted}"));
                }
                "enum" => (),
                "items" => {
                    for (index, item) in value.as_array().into_iter().flatten().enumerate() {
                        self.check(wanted, item, &format!("{place}[{index}]"))?;
                    }
                }
                "anyOf" => {
                    let fits = |schema| self.check(schema, value, place);
                    let failures: Result<Vec<_>, ()> = wanted
                        .as_array()
                        .unwrap()
                        .iter()
                        .map(|schema| fits(schema).err().ok_or(()))
                        .collect();
                    if let Ok(failures) = failures {
                        return wrong(format!("none of:\n  {}\n", failures.join("\n  ")));
                    }
                }
                "properties" => {
                    for (name, schema) in wanted.as_object().unwrap() {
                        if let Some(member) = value.get(name) {
                            self.check(schema, member, &format!("{place}.{name}"))?;
                        }
                    }
                }
                "required" => {
                    let mut names = wanted.as_array().unwrap().iter().map(|name| name.as_str().unwrap());
                    if let Some(missing) = names.find(|name| value.get(name).is_none()) {
                        return wrong(format!("lacks {missing}"));
                    }
                }
                "additionalProperties" => {
                    assert_eq!(*wanted, json!(false));
                    let known = schema["properties"].as_object().unwrap();
                    let mut names = value.as_object().into_iter().flatten().map(|(name, _)| name);
                    if let Some(more) = names.find(|name| !known.contains_key(*name)) {
                        return wrong(format!("has {more}, which no schema has"));
                    }
                }
                other => panic!("{other} is no keyword that is known here"),
            }
        }
        Ok(())
    }
}

fn has_type(value: &Value, name: &str) -> bool {
    match name {
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_i64() || value.is_u64(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        "null" => value.is_null(),
        other => panic!("{other} is no type that is known here"),
    }
}

const FILTER: &str = "<filter name='f'>
  <filterref filter='clean-traffic'/>
  <rule action='accept' direction='in'><tcp dstportstart='80'/></rule>
  <rule action='drop' direction='inout'><all/></rule>
</filter>";

struct Lab {
    host: Host,
    dir: TempDir,
    schema: Schema,
    seen: BTreeSet<String>,
}

impl Lab {
    fn command(&self, args: &[&str]) -> Command {
        let mut command = self.host.command(env!("CARGO_BIN_EXE_nwfilterctl"));
        command.current_dir(self.dir.path()).args(["--config-dir", "etc", "--state-dir", "run"]).args(args);
        command.env_remove("RUST_LOG").env_remove("VISUAL").env("EDITOR", "cp new.xml").stdin(Stdio::null());
        command
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.dir.path().join(name), text).unwrap();
    }

    fn bind(&self, port: &str, filter: &str, parameter: &str) {
        let binding = format!(
            "<filterbinding><owner><name>vm</name><uuid>d54df46f-1ab5-4a22-8618-4560ef5fac2c</uuid></owner>
             <portdev name='{port}'/><mac address='52:54:00:7b:35:93'/><filterref filter='{filter}'>{parameter}</filterref>
             </filterbinding>"
        );
        self.write(&format!("{port}.xml"), &binding);
    }

    /// Runs a verb, and compares what it prints with the schema of that name.
    fn check(&mut self, name: &str, args: &[&str]) -> Value {
        let output = self.command(&[args, &["--json"]].concat()).output().unwrap();
        let value: Value = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{args:?}: {error}: {}", String::from_utf8_lossy(&output.stderr)));
        self.compare(name, &value);
        value
    }

    fn compare(&mut self, name: &str, value: &Value) {
        if let Err(why) = self.schema.check(self.schema.of(name), value, name) {
            panic!("{why}\nin {value:#}");
        }
        self.seen.insert(name.to_owned());
    }
}

#[test]
fn what_every_verb_prints_is_what_its_schema_says() {
    skip_unless!(Need::Root, Need::Tool("iptables-restore"), Need::Tool("ebtables-restore"));
    let host = Host::new().unwrap();
    let _taps = [host.tap("tap0").unwrap(), host.tap("tap1").unwrap()];
    let mut lab =
        Lab { host, dir: tempfile::tempdir().unwrap(), schema: Schema::read(), seen: BTreeSet::new() };
    lab.write("f.xml", FILTER);
    lab.write("new.xml", &FILTER.replace("'80'", "'443'"));
    lab.write("g.xml", "<filter name='g'><filterref filter='f'/></filter>");
    lab.write("wrong.xml", "<filter name='w' prio='1'><rule action='drop' direction='up'/></filter>");
    lab.bind("tap0", "f", "<parameter name='IP' value='10.0.0.2'/>");
    lab.bind("tap1", "f", "");

    let mut watch = lab.command(&["watch", "--json"]);
    let mut watch = watch.stdout(Stdio::piped()).spawn().unwrap();
    let mut events = BufReader::new(watch.stdout.take().unwrap()).lines();
    let first: Value = serde_json::from_str(&events.next().unwrap().unwrap()).unwrap();
    assert_eq!(first["event"], "watching");
    lab.compare("watch", &first);

    lab.check("plan", &["plan", "define", "f.xml"]);
    lab.check("define", &["define", "f.xml", "g.xml"]);
    lab.check("plan", &["plan", "binding-create", "tap0.xml"]);
    lab.check("binding-create", &["binding-create", "tap0.xml", "tap1.xml"]);
    let listed = lab.check("binding-list", &["binding-list"]);
    assert_eq!(
        (&listed[0]["address"]["state"], &listed[1]["address"]["variable"]),
        (&json!("filtered"), &json!("IP"))
    );
    lab.check("edit", &["edit", "f"]);
    lab.check("list", &["list"]);
    lab.check("dumpxml", &["dumpxml", "f"]);
    lab.check("dumpxml", &["dumpxml", "clean-traffic"]);
    lab.check("users", &["users", "f"]);
    lab.check("binding-dumpxml", &["binding-dumpxml", "tap0"]);
    let found = lab.check("check", &["check", "f.xml", "wrong.xml", "missing.xml"]);
    assert!(found.as_array().unwrap().len() > 1, "{found}");
    lab.check("fmt", &["fmt", "f.xml", "tap0.xml"]);
    lab.check("render", &["render", "--binding", "tap0.xml"]);
    lab.check("explain", &["explain", "tap0", "in", "tcp", "to", ":80"]);
    lab.check("doctor", &["doctor"]);
    lab.check("config", &["config"]);
    lab.write("s.xml", "<filterset name='s' family='ipv4'><entry value='10.0.0.1'/></filterset>");
    lab.write("entries", "10.2.0.0/16\n");
    lab.check("plan", &["plan", "set-define", "s.xml"]);
    lab.check("set-define", &["set-define", "s.xml"]);
    lab.check("set-add", &["set-add", "s", "10.1.0.0/16"]);
    let removed = lab.check("set-remove", &["set-remove", "s", "10.1.0.0/16", "--cut"]);
    lab.compare("cut", &removed["cut"]);
    lab.check("set-replace", &["set-replace", "s", "--file", "entries"]);
    lab.check("set-list", &["set-list"]);
    lab.check("set-dumpxml", &["set-dumpxml", "s"]);
    lab.check("set-dumpxml", &["set-dumpxml", "--resolved", "s"]);
    lab.check("set-undefine", &["set-undefine", "s"]);
    lab.check("counters", &["counters", "tap0"]);
    lab.check("top", &["top"]);
    let exported = lab.check("export", &["export"]);
    assert_eq!(exported["bindings"].as_array().unwrap().len(), 2);
    lab.check("export-file", &["export", "all.json"]);

    lab.host.run(&["ebtables", "-t", "nat", "-F", "libvirt-I-tap0"]).unwrap();
    lab.host.run(&["iptables", "-F", "FI-tap0"]).unwrap();
    lab.host.run(&["iptables", "-F", "FORWARD"]).unwrap();
    let differences = lab.check("diff", &["diff"]);
    let place = differences.as_array().unwrap().iter().find(|difference| difference.get("at").is_some());
    assert!(place.is_some(), "{differences}");
    let status = lab.check("status", &["status"]);
    assert!(status["differences"].as_u64() > Some(0));
    lab.check("plan", &["plan", "reload"]);
    lab.check("reload", &["reload"]);
    lab.check("binding-delete", &["binding-delete", "tap0", "tap1"]);
    lab.check("undefine", &["undefine", "g", "f"]);
    lab.check("import", &["import", "all.json"]);
    let deleted = lab.check("binding-delete", &["binding-delete", "tap0"]);
    assert_eq!(deleted, json!({"deleted": ["tap0"]}));
    // Others may have been undone before the watcher looked; this one stays.
    lab.write("last.xml", "<filter name='last'/>");
    lab.check("define", &["define", "last.xml"]);
    loop {
        let event: Value = serde_json::from_str(&events.next().unwrap().unwrap()).unwrap();
        lab.compare("watch", &event);
        if event == json!({"event": "filter-defined", "filter": "last"}) {
            break;
        }
    }
    watch.kill().unwrap();
    watch.wait().unwrap();

    // These are parts of the others, or the events of the daemon, which are those that `watch` prints.
    let parts = [
        "address",
        "binding",
        "counter",
        "difference",
        "document",
        "event",
        "keep",
        "name",
        "place",
        "port",
        "set",
        "set-change",
        "uuid",
    ];
    let unseen: Vec<_> = lab
        .schema
        .verbs()
        .into_iter()
        .filter(|name| !lab.seen.contains(name) && !parts.contains(&name.as_str()))
        .collect();
    assert_eq!(unseen, [""; 0], "these schemas are compared with nothing");
}

#[test]
fn a_value_that_does_not_fit_its_schema_is_refused_with_the_place() {
    let schema = Schema::read();
    let refused = |name: &str, value: Value| schema.check(schema.of(name), &value, name).unwrap_err();
    assert!(
        refused("undefine", json!({"undefined": [7]})).starts_with("undefine.undefined[0]: no \"string\"")
    );
    assert!(refused("undefine", json!({})).contains("lacks undefined"));
    assert!(refused("undefine", json!({"undefined": [], "x": 1})).contains("has x"));
    assert!(refused("watch", json!({"event": "nothing"})).contains("none of"));
    assert!(
        refused("export", json!({"format": "x", "version": 1, "filters": [], "bindings": []}))
            .contains("not in")
    );
}
