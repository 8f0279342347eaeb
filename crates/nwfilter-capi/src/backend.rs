//! Which backend a driver gets. The choice is the one of `nwfilterctl --backend`.

use nwfilter::{Backend, Fake, Layout};
use nwfilter_nftables::{Nftables, suits};
use nwfilter_xtables::{Dispatch, Settings, Xtables};

use crate::code::nwf_code;
use crate::error::Failure;
use crate::options::{
    NWF_OPEN_KEEP_BRIDGE_NF, NWF_OPEN_OWNER, NWF_OPEN_WITHOUT_HELPERS, Options, nwf_backend,
};

/// The backend that the options ask for. It is refused while another one filters ports, which would then have to pass the
/// rules of both.
pub(crate) fn choose(options: &Options) -> Result<Box<dyn Backend>, Failure> {
    let directory = &options.config.state_dir;
    let nftables = match options.flags & NWF_OPEN_OWNER {
        0 => Nftables::new().beside(directory),
        _ => Nftables::new().owning(directory),
    };
    let xtables = Xtables::new(Settings {
        enable_bridge_filtering: options.flags & NWF_OPEN_KEEP_BRIDGE_NF == 0,
        conntrack_helpers: options.flags & NWF_OPEN_WITHOUT_HELPERS == 0,
        // libvirt's driver could not delete what a tree refers to.
        dispatch: if options.config.layout == Layout::Libvirt { Dispatch::Keep } else { Dispatch::Tree },
    });
    let native = match options.backend {
        nwf_backend::NWF_BACKEND_FAKE => return Ok(Box::new(Fake::new())),
        nwf_backend::NWF_BACKEND_NFTABLES => true,
        nwf_backend::NWF_BACKEND_XTABLES => false,
        nwf_backend::NWF_BACKEND_AUTO => suits(&nftables, &xtables, || options.config.names_an_ip_set()).0,
    };
    let (nftables, xtables): (Box<dyn Backend>, Box<dyn Backend>) = (Box::new(nftables), Box::new(xtables));
    let (chosen, other) = if native { (nftables, xtables) } else { (xtables, nftables) };
    if other.filters_ports() && !(native && chosen.filters_ports()) {
        let (here, wanted) = (other.name(), chosen.name());
        let why = format!(
            "ports of this host are filtered by {here}: open the driver with it, or move them with \
             'nwfilterctl reload --backend {wanted}'"
        );
        return Err(Failure::Own(nwf_code::NWF_OTHER_BACKEND, why));
    }
    Ok(chosen)
}
