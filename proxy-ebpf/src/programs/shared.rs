//! What several stages have in common: functions that they call through [`penstock_ebpf::env::Maps`].

use aya_ebpf::{bindings::__sk_buff, programs::TcContext};
use penstock_common::{FlowId, V4, V6};
use penstock_ebpf::{
    pod,
    quoted::{self, Quote},
};

use crate::kernel::{env::Kernel, skb::Skb};

/// A function of [`pod`]'s for one family; no stage, but what several of them have in common.
macro_rules! back {
    ($name:ident, $path:ident, $family:ty) => {
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub(crate) extern "C" fn $name(skb: *mut __sk_buff) -> i32 {
            let context = TcContext::new(skb);
            let mut skb = Skb::new(&context);
            let kernel = Kernel { context: &context };
            pod::encode_back(pod::$path::<$family, _>(&mut skb, &kernel))
        }
    };
}
back!(back4, back_itself, V4);
back!(back6, back_itself, V6);
back!(about_request4, about_request, V4);
back!(about_request6, about_request, V6);

/// What an ICMP error quotes, and how it is translated, for one family.
macro_rules! quoted {
    ($family:ty: $look:ident, $requote:ident) => {
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub(crate) extern "C" fn $look(skb: *mut __sk_buff) -> u32 {
            let context = TcContext::new(skb);
            quoted::look::<$family>(&Skb::new(&context))
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        pub(crate) extern "C" fn $requote(
            skb: *mut __sk_buff,
            quote: u32,
            id: u32,
            is_about_request: u32,
        ) -> u32 {
            let context = TcContext::new(skb);
            let mut skb = Skb::new(&context);
            let kernel = Kernel { context: &context };
            let Some(quote) = Quote::from_bits(quote) else {
                return 0;
            };
            let is_about_request = is_about_request != 0;
            quoted::requote::<$family, _>(&mut skb, &kernel, quote, FlowId(id), is_about_request)
                .into()
        }
    };
}
quoted!(V4: quote4, requote4);
quoted!(V6: quote6, requote6);
