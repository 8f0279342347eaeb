//! What the settings of the host say to the module, and what holds where they say nothing.
//!
//! `connect` and `guard` do not concern it: libvirt itself binds a port before its guest runs.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nwfilter::rules::LogGroup;
use nwfilter::{Backend, Builder, Config, Driver, Error, Learning, serve_metrics, with_causes};
use nwfilter_nftables::Nftables;
use nwfilter_settings::{Key, Settings, Source};
use nwfilter_xtables::{Dispatch, Settings as Chains, Xtables};

use crate::choice::Choice;
use crate::logging;

/// How the driver of this process is opened.
#[derive(Clone, Debug)]
pub(crate) struct Setup {
    pub(crate) choice: Choice,
    config: Config,
    chains: Chains,
    /// What was read; `None` in the daemon of a user other than root.
    settings: Option<Settings>,
}

impl Setup {
    /// As the settings of the host say. The error names what cannot be read.
    pub(crate) fn of_host() -> Result<Self, String> {
        let settings = Settings::load(None).map_err(|error| with_causes(&error))?;
        logging::limit(given(&settings, Key::Log));
        let config = config(&settings);
        let choice = Choice::of_host(&settings, &config)?;
        let dispatch =
            if given(&settings, Key::Dispatch) == Some("list") { Dispatch::List } else { Dispatch::Tree };
        let chains = Chains {
            dispatch,
            enable_bridge_filtering: !settings.is_on(Key::KeepBridgeNf),
            conntrack_helpers: settings.is_on(Key::Helpers),
        };
        Ok(Self { choice, config, chains, settings: Some(settings) })
    }

    /// For the daemon of a user other than root, which filters nothing.
    pub(crate) fn of_session() -> Self {
        Self { choice: Choice::Xtables, config: Config::libvirt(), chains: Chains::default(), settings: None }
    }

    /// Opens the driver.
    pub(crate) fn open(&self, builder: Builder) -> Result<Driver, Error> {
        builder.config(self.config.clone()).open(self.backend(self.chains.dispatch))
    }

    /// Opens the driver with the chains that libvirt's own driver can take over, to hand them over.
    pub(crate) fn open_as_list(&self) -> Result<Driver, Error> {
        let builder = Driver::builder().without_learner().config(self.config.clone());
        builder.open(self.backend(Dispatch::List))
    }

    /// The backend. The native one owns its table, and serves others in the directory of the bindings.
    fn backend(&self, dispatch: Dispatch) -> Box<dyn Backend> {
        match self.choice {
            Choice::Xtables => Box::new(Xtables::new(Chains { dispatch, ..self.chains })),
            Choice::Nftables => Box::new(Nftables::new().owning(&self.config.state_dir)),
        }
    }

    /// Where the bindings are.
    pub(crate) fn state_dir(&self) -> &Path {
        &self.config.state_dir
    }

    /// Serves metrics where the settings say so. A host without metrics is filtered all the same, so this only logs what fails.
    pub(crate) fn serve_metrics(&self, driver: &Arc<Driver>) {
        let Some(address) = self.settings.as_ref().and_then(|settings| settings.get(Key::Metrics)) else {
            return;
        };
        match serve_metrics(address, driver) {
            Ok(()) => log::info!("metrics are served at {address}"),
            Err(error) => log::error!("cannot serve metrics at {address}: {error}"),
        }
    }

    /// Logs in what the settings differ from those that are in force.
    pub(crate) fn compare_with_host(&self) {
        let Some(settings) = &self.settings else { return };
        match Settings::load(None) {
            Err(error) => log::error!("the old settings stay: {}", with_causes(&error)),
            Ok(newer) => settings.differences(&newer).iter().for_each(|difference| {
                log::warn!("setting {difference}; this takes effect when the daemon starts the next time");
            }),
        }
    }
}

/// What was set; not a default, because libvirt's driver has others.
fn given(settings: &Settings, key: Key) -> Option<&str> {
    settings.get(key).filter(|_| *settings.source(key) != Source::Default)
}

/// libvirt's own stores, or those that were set, which are read as libvirt reads its own.
fn config(settings: &Settings) -> Config {
    let mut config = Config::libvirt();
    if let Some(directory) = given(settings, Key::ConfigDir) {
        config.config_dir = directory.into();
    }
    if let Some(directory) = given(settings, Key::StateDir) {
        config.state_dir = directory.into();
    }
    if let Some(group) = settings.get(Key::LogGroup).and_then(|group| group.parse().ok()) {
        config.log_group = LogGroup(group);
    }
    let servers = settings.get(Key::LearningServers);
    // Both were checked when they were read.
    let learning = settings.get(Key::LearningMethod).and_then(|word| Learning::from_words(word, servers));
    config.learning = learning.unwrap_or_default();
    let seconds = given(settings, Key::Timeout).and_then(|seconds| seconds.parse().ok());
    config.patience = seconds.map(Duration::from_secs);
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stores_that_nobody_set_are_libvirts() -> Result<(), nwfilter_settings::Error> {
        let of = |text: &str| Settings::read("a.toml".as_ref(), text, |_| None).map(|read| config(&read));
        let nothing = of("guard = 'vnet'\n")?;
        assert_eq!(nothing.config_dir, Config::libvirt().config_dir);
        assert_eq!(nothing.state_dir, Config::libvirt().state_dir);
        assert_eq!(nothing.patience, None);
        let all = of("config-dir = '/srv/filters'\nstate-dir = '/run/bindings'\ntimeout = 7\n")?;
        assert_eq!(all.config_dir.to_str(), Some("/srv/filters"));
        assert_eq!(all.state_dir.to_str(), Some("/run/bindings"));
        assert_eq!(all.patience.map(|patience| patience.as_secs()), Some(7));
        assert_eq!(all.layout, Config::libvirt().layout);
        Ok(())
    }
}
